//! The guest's console: keeps the end of its output for error messages.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Size of the kept output, in bytes.
const KEPT_BYTES: usize = 16 * 1024;

/// How long the last output of an ended VMM may take to arrive, and how often to check.
const COMPLETE_LIMIT: Duration = Duration::from_millis(500);
const COMPLETE_LOOK: Duration = Duration::from_millis(5);

/// Reads the console until it is dropped.
pub struct Console {
    kept: Arc<Mutex<VecDeque<u8>>>,
    reading: JoinHandle<()>,
}

impl Console {
    /// Reads the guest's output in a separate task.
    #[must_use]
    pub fn read(from: impl AsyncRead + Send + Unpin + 'static) -> Self {
        let kept = Arc::default();
        let reading = tokio::spawn(keep(from, Arc::clone(&kept)));
        Self { kept, reading }
    }

    /// Returns the end of the output, without carriage returns.
    #[must_use]
    pub fn tail(&self) -> String {
        let mut kept = self.kept.lock();
        String::from_utf8_lossy(kept.make_contiguous()).replace('\r', "")
    }

    /// Waits until the output of an ended VMM is complete. If the VMM still runs, returns after a
    /// moment.
    pub async fn complete(&self) {
        let complete = async {
            while !self.reading.is_finished() {
                sleep(COMPLETE_LOOK).await;
            }
        };
        // Output that has not arrived by then does not arrive at all.
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
    // The loop ends when the VMM has ended or reading fails.
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
    async fn end_of_the_output_is_kept() {
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
