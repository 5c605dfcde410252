//! The guest's console: its last words, kept for errors.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// What is kept, in bytes.
const KEPT_BYTES: usize = 16 * 1024;

/// How long the last words of a VMM may be on their way, and how often to look.
const COMPLETE_LIMIT: Duration = Duration::from_millis(500);
const COMPLETE_LOOK: Duration = Duration::from_millis(5);

/// Reads the console for as long as it lives.
pub struct Console {
    kept: Arc<Mutex<VecDeque<u8>>>,
    reading: JoinHandle<()>,
}

impl Console {
    /// Reads what the guest writes, in a task of its own.
    #[must_use]
    pub fn read(from: impl AsyncRead + Send + Unpin + 'static) -> Self {
        let kept = Arc::default();
        let reading = tokio::spawn(keep(from, Arc::clone(&kept)));
        Self { kept, reading }
    }

    /// The end of the output, without what a terminal would not show.
    #[must_use]
    pub fn tail(&self) -> String {
        let mut kept = self.kept.lock();
        String::from_utf8_lossy(kept.make_contiguous()).replace('\r', "")
    }

    /// Waits until the last words of a VMM that has ended are there, or for a moment if it has not.
    pub async fn complete(&self) {
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

async fn keep(mut from: impl AsyncRead + Unpin, kept: Arc<Mutex<VecDeque<u8>>>) {
    let mut buffer = [0; 1024];
    // The VMM is gone, or we are.
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let mut kept = kept.lock();
        kept.extend(&buffer[..length]);
        let excess = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn last_words_are_kept_and_the_first_forgotten() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let console = Console::read(near);

        far.write_all(&vec![b'.'; 2 * KEPT_BYTES]).await.unwrap();
        far.write_all(b"last words\r\n").await.unwrap();

        let complete = async {
            while !console.tail().ends_with("last words\n") {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(5), complete).await.unwrap();
        assert!(console.tail().len() < KEPT_BYTES);
    }
}
