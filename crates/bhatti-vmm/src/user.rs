//! Users of VMMs: if the daemon is root, each VMM runs as its own user.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;

use bhatti_host::process::{USERS, can_use_users};
use bhatti_types::SandboxId;

/// Returns the user that the VMM of a sandbox runs as, if the daemon can run it as another user.
/// If two sandboxes get the same user by chance, their confinement rules still isolate them.
#[must_use]
pub fn user_of(id: SandboxId) -> u32 {
    let hash = blake3::hash(id.to_string().as_bytes());
    let [a, b, c, d, ..] = *hash.as_bytes();
    USERS.start + u32::from_le_bytes([a, b, c, d]) % (USERS.end - USERS.start)
}

/// Makes a user the owner of a file, if the daemon can. A missing file is no error: the program
/// that opens it reports that better.
///
/// # Errors
///
/// Returns the error of chown(2).
pub fn give_to(path: &Path, user: u32) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(file) if can_use_users() && file.uid() != user => lchown(path, Some(user), None),
        _ => Ok(()),
    }
}

/// Gives a file the same owner as `other`: the user of the VMM that writes both.
///
/// # Errors
///
/// Returns the error of stat(2) or chown(2).
pub fn give_as(path: &Path, other: &Path) -> io::Result<()> {
    give_to(path, fs::metadata(other)?.uid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandboxes_get_distinct_users_from_the_reserved_range() {
        let users = [1, 2, 3].map(|seed| user_of(SandboxId::from_entropy([seed; 8])));
        assert!(users.iter().all(|user| USERS.contains(user)), "{users:?}");
        assert!(users[0] != users[1] && users[1] != users[2]);
    }
}
