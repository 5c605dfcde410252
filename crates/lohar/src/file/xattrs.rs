//! Extended attributes, which a new file takes over from the file that it replaces.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{XattrFlags, fremovexattr, fsetxattr, getxattr, lgetxattr, listxattr, llistxattr};
use rustix::io::Errno;

/// The largest list of attribute names, and the largest value, in bytes: `XATTR_LIST_MAX` and
/// `XATTR_SIZE_MAX` of linux/limits.h.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;

/// Copies the attributes of `from`, which may be open as a path only. Leaves out attributes that
/// this user may not set: the kernel, too, drops attributes of root when another user writes to a
/// file.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let from = format!("/proc/self/fd/{}", from.as_raw_fd());
    let mut names = Vec::new();
    match read(&mut names, |buffer| listxattr(&*from, buffer)) {
        Ok(()) => {}
        Err(Errno::NOTSUP | Errno::NOSYS) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let mut value = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        match read(&mut value, |buffer| getxattr(&*from, name, buffer)) {
            Ok(()) => {}
            // The attribute has been removed meanwhile, or this user may not read it.
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS) => continue,
            Err(error) => return Err(error.into()),
        }
        match fsetxattr(to, name, &value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::PERM | Errno::ACCESS | Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Returns the attributes of a file that this user may read. Names that are not UTF-8 are left out.
pub(super) fn all(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = Vec::new();
    match read(&mut names, |buffer| llistxattr(path, buffer)) {
        Ok(()) => {}
        Err(Errno::NOTSUP | Errno::NOSYS) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    }
    let mut all = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let Ok(text) = std::str::from_utf8(name) else { continue };
        let mut value = Vec::new();
        match read(&mut value, |buffer| lgetxattr(path, name, buffer)) {
            Ok(()) => all.push((text.to_owned(), value)),
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(all)
}

/// Replaces the attributes `user.*` of a file whose names go on with `prefix`.
pub(super) fn replace(
    file: BorrowedFd<'_>,
    prefix: &str,
    attributes: &BTreeMap<String, String>,
) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut names = Vec::new();
    match read(&mut names, |buffer| listxattr(&*path, buffer)) {
        Ok(()) => {}
        Err(Errno::NOTSUP | Errno::NOSYS) if attributes.is_empty() => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let prefix = format!("user.{prefix}");
    let is_replaced = |name: &&[u8]| name.starts_with(prefix.as_bytes());
    for name in names.split(|byte| *byte == 0).filter(is_replaced) {
        match fremovexattr(file, name) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for (name, value) in attributes {
        fsetxattr(file, format!("user.{name}"), value.as_bytes(), XattrFlags::empty())?;
    }
    Ok(())
}

fn read(
    into: &mut Vec<u8>,
    read: impl FnOnce(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<()> {
    into.resize(ATTRIBUTE_BYTES_MAX, 0);
    let length = read(into)?;
    into.truncate(length);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn attributes_are_copied() {
        let (from, to) = (tempfile::tempfile_in(".").unwrap(), tempfile::tempfile_in(".").unwrap());
        let attributes = [("user.one", vec![1, 0, 2]), ("user.empty", vec![])];
        for (name, value) in &attributes {
            fsetxattr(&from, *name, value, XattrFlags::empty()).unwrap();
        }

        copy(from.as_fd(), to.as_fd()).unwrap();

        let path = format!("/proc/self/fd/{}", File::as_raw_fd(&to));
        for (name, expected) in attributes {
            let mut value = Vec::new();
            read(&mut value, |buffer| getxattr(&*path, name, buffer)).unwrap();
            assert_eq!(value, expected, "{name}");
        }
    }
}
