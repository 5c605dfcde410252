//! Namespaces of single threads.

use std::io;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves this thread, and the threads and processes that it starts from now on, into a new
/// network namespace. The namespace has only a loopback interface, which is down.
///
/// # Errors
///
/// Returns an error if this process lacks the rights.
pub fn enter_own_network() -> io::Result<()> {
    // SAFETY: only this thread's network namespace changes, and no memory that threads share.
    #[expect(unsafe_code, reason = "a thread may not lose what others share with it")]
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}
