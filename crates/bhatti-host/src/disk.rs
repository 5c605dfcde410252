//! Room on a file system.

use std::io;
use std::path::Path;

/// Bytes that may still be written below `directory`.
///
/// # Errors
///
/// Returns the error of statvfs(3).
pub fn free_bytes(directory: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(directory)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
