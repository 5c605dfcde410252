//! Views of the system that are a thread's own.

use std::io;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives this thread, and the threads and processes that it starts from now on, a network of their own, in which there is nothing but a
/// loopback that is down.
///
/// # Errors
///
/// Returns an error if this process may not.
pub fn enter_own_network() -> io::Result<()> {
    // SAFETY: only this thread's view of the network changes, and nothing that threads share in memory.
    #[expect(unsafe_code, reason = "a thread may not lose what others share with it")]
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}
