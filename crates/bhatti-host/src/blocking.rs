//! Blocking work in asynchronous code.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;

/// Does work that may block on a disk. On a worker thread of a multi-threaded runtime, another
/// thread takes the worker's other tasks meanwhile. On a runtime with a single thread, or outside
/// a runtime, this only calls `work`.
///
/// Futures that are polled in the same task wait, too: for work that takes long, use
/// [`spawn_blocking`](tokio::task::spawn_blocking).
///
/// # Cancel safety
///
/// The work is not interrupted: this is no point at which a task can be canceled.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn other_tasks_run_while_one_blocks() {
        let (done, is_done) = mpsc::channel();
        let blocked = tokio::spawn(async move { blocking(|| is_done.recv()) });
        // Runs on the only worker, unless that worker is blocked.
        tokio::spawn(async move { done.send("ran") }).await.unwrap().unwrap();
        assert_eq!(blocked.await.unwrap(), Ok("ran"));
    }

    #[test]
    fn work_is_done_outside_a_runtime() {
        assert_eq!(blocking(|| 7), 7);
    }
}
