//! The agent channel of a VM, which reconnects when the connection breaks.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, AgentStream, ChannelError};
use bhatti_host::socket;
use bhatti_proto::mux::{OpenError, Opener};
use bhatti_proto::resync::{Epoch, greet};
use tokio::sync::Mutex;
use tokio::time::timeout;

pub(crate) const SOCKET: &str = "agent.sock";

/// How long the first connection attempt waits for the agent. Each further attempt waits twice as
/// long, up to [`LONGEST_ATTEMPT`].
///
/// If a connection is lost while the guest writes, QEMU's port can stay throttled forever: the
/// failed write closes the port, which lifts the throttle, and only then throttles it
/// (`flush_buf` of hw/char/virtio-console.c, QEMU 10). Closing the port again lifts the throttle.
const FIRST_ATTEMPT: Duration = Duration::from_millis(250);
const LONGEST_ATTEMPT: Duration = Duration::from_secs(4);

/// How long a running guest may take to answer a new connection.
const RECONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The channel of one VM.
pub struct QemuChannel {
    directory: PathBuf,
    opener: Mutex<Option<Opener>>,
}

impl QemuChannel {
    /// Creates the channel of the VM in `directory`, not connected yet.
    pub(crate) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), opener: Mutex::new(None) }
    }

    async fn connected(&self) -> io::Result<Opener> {
        let mut slot = self.opener.lock().await;
        if let Some(opener) = slot.as_ref().filter(|opener| !opener.is_closed()) {
            return Ok(opener.clone());
        }
        let mut limit = FIRST_ATTEMPT;
        loop {
            if let Ok(opener) = timeout(limit, self.attempt()).await {
                let opener = opener?;
                *slot = Some(opener.clone());
                return Ok(opener);
            }
            limit = LONGEST_ATTEMPT.min(2 * limit);
        }
    }

    async fn attempt(&self) -> io::Result<Opener> {
        let stream = socket::connect_in(&self.directory, SOCKET).await?;
        let mut epoch = Epoch::default();
        getrandom::fill(&mut epoch).map_err(io::Error::other)?;
        let stream = greet(stream, epoch).await.map_err(io::Error::other)?;
        let (opener, driver) = Opener::new(stream);
        tokio::spawn(driver);
        Ok(opener)
    }
}

#[async_trait]
impl AgentChannel for QemuChannel {
    async fn open(&self, port: u32) -> Result<Box<dyn AgentStream>, ChannelError> {
        let failed = |kind: io::ErrorKind| ChannelError(kind.into());
        let open = async {
            // Only use shows that a channel has just broken: try again once.
            for _ in 0..2 {
                match self.connected().await.map_err(ChannelError)?.open(port).await {
                    Ok(stream) => return Ok(Box::new(stream) as Box<dyn AgentStream>),
                    Err(OpenError::Closed) => {}
                    Err(error @ OpenError::TooMany) => {
                        return Err(ChannelError(io::Error::other(error)));
                    }
                }
            }
            Err(failed(io::ErrorKind::BrokenPipe))
        };
        timeout(RECONNECT_LIMIT, open).await.map_err(|_| failed(io::ErrorKind::TimedOut))?
    }
}
