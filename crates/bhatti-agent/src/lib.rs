//! The host's client of the guest agent.
//!
//! Knows what can be asked of the agent; how its streams travel is the [`AgentChannel`]'s affair. One call, one stream.

mod exec;
mod unix;

use std::sync::Arc;

use bhatti_engine::{AgentChannel, AgentStream, ChannelError};
use bhatti_proto::{CONTROL_PORT, ExecRequest, FrameReader, FrameType, FrameWriter};

pub use exec::{ExecError, ExecEvent, ExecInput, ExecOutput};
pub use unix::UnixChannel;

/// Asks the agent of one VM.
#[derive(Clone)]
pub struct AgentClient {
    channel: Arc<dyn AgentChannel>,
}

impl AgentClient {
    /// A client of the agent behind `channel`.
    #[must_use]
    pub fn new(channel: Arc<dyn AgentChannel>) -> Self {
        Self { channel }
    }

    /// Starts a command, with pipes for its standard streams. Whether it could be started is the first thing that the output says.
    /// Dropping both halves kills it.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be reached or the request fits in no frame.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves no command behind.
    pub async fn exec(
        &self,
        mut request: ExecRequest,
    ) -> Result<(ExecInput, ExecOutput), ExecError> {
        request.error_details = true;
        let (reader, mut writer) = tokio::io::split(self.open().await?);
        let mut frames = FrameWriter::new(&mut writer);
        frames.send_json(FrameType::EXEC_REQ, &request).await.map_err(ExecError::Send)?;
        Ok((ExecInput::new(writer), ExecOutput::new(FrameReader::new(reader))))
    }

    /// Asks the guest to shut down. Returns when it has said that it will.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be reached or refuses.
    pub async fn shut_down(&self) -> Result<(), ExecError> {
        let (reader, mut writer) = tokio::io::split(self.open().await?);
        FrameWriter::new(&mut writer)
            .send(FrameType::SHUTDOWN_REQ, &[])
            .await
            .map_err(ExecError::Write)?;
        match ExecOutput::new(FrameReader::new(reader)).next().await? {
            ExecEvent::Exit(_) => Ok(()),
            ExecEvent::Stdout(_) | ExecEvent::Stderr(_) => Err(ExecError::Unexpected),
        }
    }

    async fn open(&self) -> Result<Box<dyn AgentStream>, ChannelError> {
        self.channel.open(CONTROL_PORT).await
    }
}
