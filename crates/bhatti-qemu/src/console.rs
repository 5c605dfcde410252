//! The guest's console: its last words, kept for errors.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bhatti_host::socket;
use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

pub(crate) const SOCKET: &str = "console.sock";

/// What is kept, in bytes.
const KEPT_BYTES: usize = 16 * 1024;

/// How long the last words of a VMM may be on their way, and how often to look.
const COMPLETE_LIMIT: Duration = Duration::from_millis(500);
const COMPLETE_LOOK: Duration = Duration::from_millis(5);

/// Reads the console for as long as it lives.
pub(crate) struct Console {
    kept: Arc<Mutex<VecDeque<u8>>>,
    reading: JoinHandle<()>,
}

impl Console {
    /// Connects to the console of the VM in `directory`.
    pub(crate) fn connect(directory: &Path) -> io::Result<Self> {
        let stream = socket::connect_in(directory, SOCKET)?;
        stream.set_nonblocking(true)?;
        let stream = UnixStream::from_std(stream)?;
        let kept = Arc::default();
        let reading = tokio::spawn(read(stream, Arc::clone(&kept)));
        Ok(Self { kept, reading })
    }

    /// The end of the output, without what a terminal would not show.
    pub(crate) fn tail(&self) -> String {
        let mut kept = self.kept.lock();
        String::from_utf8_lossy(kept.make_contiguous()).replace('\r', "")
    }
}

impl Console {
    /// Waits until the last words of a VMM that has ended are there, or for a moment if it has not.
    pub(crate) async fn complete(&self) {
        let complete = async {
            while !self.reading.is_finished() {
                sleep(COMPLETE_LOOK).await;
            }
        };
        // What has not come by then does not come.
        drop(timeout(COMPLETE_LIMIT, complete).await);
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

async fn read(mut stream: UnixStream, kept: Arc<Mutex<VecDeque<u8>>>) {
    let mut buffer = [0; 1024];
    // The VMM is gone, or we are.
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        let mut kept = kept.lock();
        kept.extend(&buffer[..length]);
        let excess = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn last_words_are_kept_and_the_first_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let listener = socket::listen_in(directory.path(), SOCKET).unwrap();
        let console = Console::connect(directory.path()).unwrap();
        let (far, _) = listener.accept().unwrap();
        far.set_nonblocking(true).unwrap();
        let mut far = UnixStream::from_std(far).unwrap();

        far.write_all(&vec![b'.'; 2 * KEPT_BYTES]).await.unwrap();
        far.write_all(b"last words\r\n").await.unwrap();

        let complete = async {
            while !console.tail().ends_with("last words\n") {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(5), complete).await.unwrap();
        assert!(console.tail().len() < KEPT_BYTES);
    }
}
