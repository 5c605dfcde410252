//! Owners, permissions, extended attributes and times of files.

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, Gid, Mode, Uid, XattrFlags};
use rustix::io::Errno;

use super::LayerError;
use super::owners::Owners;
use super::reader::{Entry, Kind};
use super::tree::{Directory, times};

/// Attributes that an image may set. The others belong to the kernel or to its administrator.
const ALLOWED: [&[u8]; 3] =
    [b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"];
/// Prefix of further attributes that it may set.
const ALLOWED_PREFIX: &[u8] = b"user.";

/// Maximum size of a file's extended attributes, in bytes: ext4 keeps them in one block.
const ATTRIBUTE_BYTES_MAX: usize = 3900;
/// What ext4 adds to each attribute, in bytes.
const ATTRIBUTE_OVERHEAD: usize = 16;

/// Sets the metadata of an open file or directory. Returns the number of attributes left out.
pub(super) fn set(file: impl AsFd, entry: &Entry, owners: &Owners) -> Result<u64, LayerError> {
    let file = file.as_fd();
    match owners {
        Owners::Real => {
            let (user, group) = (Uid::from_raw(entry.user), Gid::from_raw(entry.group));
            rustix::fs::fchown(file, Some(user), Some(group))?;
        }
        Owners::Recorded(record) => {
            Owners::record(record, &rustix::fs::fstat(file)?, entry, entry.mode)?;
        }
    }
    // After the owner, because changing the owner removes setuid and capabilities.
    let mode = owners.mode_here(entry.mode, entry.kind == Kind::Directory);
    rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?;
    let left_out = set_attributes(file, entry)?;
    rustix::fs::futimens(file, &times(entry.time))?;
    Ok(left_out)
}

/// Sets the metadata of a file that is not opened: a link or a FIFO. Returns the number of
/// attributes left out.
pub(super) fn set_unopened(
    directory: &Directory,
    base: &[u8],
    entry: &Entry,
    owners: &Owners,
) -> Result<u64, LayerError> {
    let has_mode = entry.kind == Kind::Fifo;
    match owners {
        Owners::Real => {
            let (user, group) = (Uid::from_raw(entry.user), Gid::from_raw(entry.group));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(directory, base, Some(user), Some(group), flags)?;
        }
        Owners::Recorded(record) => {
            let stat = rustix::fs::statat(directory, base, AtFlags::SYMLINK_NOFOLLOW)?;
            let mode = if has_mode { entry.mode } else { 0o777 };
            Owners::record(record, &stat, entry, mode)?;
        }
    }
    if has_mode {
        let mode = Mode::from_raw_mode(owners.mode_here(entry.mode, false));
        rustix::fs::chmodat(directory, base, mode, AtFlags::empty())?;
    }
    rustix::fs::utimensat(directory, base, &times(entry.time), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(entry.attributes.len() as u64)
}

/// Removes the extended attributes that a directory has from a lower layer.
pub(super) fn clear_attributes(directory: &Directory) -> Result<(), LayerError> {
    let mut names = vec![0; 2 * ATTRIBUTE_BYTES_MAX];
    let length = match rustix::fs::flistxattr(directory, &mut names) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| is_allowed(name)) {
        rustix::fs::fremovexattr(directory, name)?;
    }
    Ok(())
}

fn is_allowed(name: &[u8]) -> bool {
    ALLOWED.contains(&name) || name.starts_with(ALLOWED_PREFIX)
}

fn set_attributes(file: impl AsFd, entry: &Entry) -> Result<u64, LayerError> {
    let (allowed, left_out): (Vec<_>, Vec<_>) =
        entry.attributes.iter().partition(|(name, _)| is_allowed(name));
    let size = |(name, value): &&(Vec<u8>, Vec<u8>)| name.len() + value.len() + ATTRIBUTE_OVERHEAD;
    if allowed.iter().map(size).sum::<usize>() > ATTRIBUTE_BYTES_MAX {
        return Err(LayerError::Format("its extended attributes have more than 3,900 bytes"));
    }
    let mut refused = 0;
    for (name, value) in allowed {
        match rustix::fs::fsetxattr(&file, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) => {}
            // Only root may set capabilities.
            Err(Errno::PERM) => refused += 1,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(left_out.len() as u64 + refused)
}
