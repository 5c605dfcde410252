//! The output of an operation's work: the last part is kept, and readers can follow it.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::watch;

/// Bytes of an operation's output that are kept.
const KEPT_BYTES: usize = 256 << 10;

/// The output of an operation.
pub(crate) struct OperationLog {
    kept: Mutex<Kept>,
    /// The bytes that have been written, and whether more can follow.
    written: watch::Sender<(u64, bool)>,
}

#[derive(Default)]
struct Kept {
    /// The place of the first kept byte in the whole output.
    start: u64,
    bytes: VecDeque<u8>,
}

/// A part of an operation's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogPart {
    /// The place of its first byte in the whole output.
    pub start: u64,
    /// The output.
    pub bytes: Vec<u8>,
}

impl Default for OperationLog {
    fn default() -> Self {
        Self { kept: Mutex::default(), written: watch::Sender::new((0, true)) }
    }
}

impl OperationLog {
    /// Adds output. Drops the oldest if there is too much.
    pub(crate) fn write(&self, output: &[u8]) {
        let mut kept = self.kept.lock();
        kept.bytes.extend(output);
        let surplus = kept.bytes.len().saturating_sub(KEPT_BYTES);
        kept.bytes.drain(..surplus);
        kept.start += surplus as u64;
        let end = kept.start + kept.bytes.len() as u64;
        self.written.send_modify(|written| written.0 = end);
    }

    /// Says that no more output follows.
    pub(crate) fn end(&self) {
        self.written.send_modify(|written| written.1 = false);
    }

    /// Waits for output after the byte `from`, and returns it from there on, or from the first kept
    /// byte on if that is later. Returns `None` if no more follows.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub(crate) async fn read(&self, from: u64) -> Option<LogPart> {
        let mut written = self.written.subscribe();
        // The sender lives as long as this.
        written.wait_for(|(end, more)| *end > from || !more).await.ok()?;
        let kept = self.kept.lock();
        let skipped = usize::try_from(from.saturating_sub(kept.start)).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = kept.bytes.iter().skip(skipped).copied().collect();
        (!bytes.is_empty()).then(|| LogPart { start: kept.start.max(from), bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn readers_get_what_is_kept_and_what_follows() {
        let log = OperationLog::default();
        log.write(b"one");
        assert_eq!(log.read(0).await, Some(LogPart { start: 0, bytes: b"one".to_vec() }));
        assert_eq!(log.read(2).await, Some(LogPart { start: 2, bytes: b"e".to_vec() }));
        let mut waiting = Box::pin(log.read(3));
        let is_waiting = tokio::select! {
            biased;
            _ = &mut waiting => false,
            () = std::future::ready(()) => true,
        };
        assert!(is_waiting);

        log.write(b"two");

        assert_eq!(waiting.await, Some(LogPart { start: 3, bytes: b"two".to_vec() }));
        log.end();
        assert_eq!(log.read(4).await, Some(LogPart { start: 4, bytes: b"wo".to_vec() }));
        assert_eq!((log.read(6).await, log.read(u64::MAX).await), (None, None));
    }

    #[tokio::test]
    async fn oldest_output_is_dropped_beyond_the_limit() {
        let log = OperationLog::default();
        for byte in 0..10 {
            log.write(&[byte; 64 << 10]);
        }

        let part = log.read(5).await.unwrap();

        assert_eq!((part.start, part.bytes.len()), (384 << 10, 256 << 10));
        assert_eq!((part.bytes.first(), part.bytes.last()), (Some(&6), Some(&9)));
    }
}
