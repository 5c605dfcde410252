//! Names of entries.

use super::LayerError;

/// Maximum length of one component, in bytes: what file systems allow.
const COMPONENT_BYTES_MAX: usize = 255;
/// Maximum length of a path, in bytes: what system calls accept.
const PATH_BYTES_MAX: usize = 4095;
/// Maximum number of components. Removing a tree keeps as many directories open.
const DEPTH_MAX: usize = 1000;

/// Prefix of the names of whiteouts.
const WHITEOUT: &[u8] = b".wh.";
/// Prefix of names with a meaning for AUFS.
const SPECIAL: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What an entry's last component says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning<'name> {
    /// It is a file's own name.
    Plain,
    /// Lower layers' file of this name is removed.
    Whiteout(&'name [u8]),
    /// All that lower layers have in the directory is removed.
    Opaque,
    /// It is AUFS's own and has no meaning here.
    Ignored,
}

/// Returns a name relative to the root, without `.` and repeated slashes. The root is empty.
pub(super) fn normalize(name: &[u8]) -> Result<Vec<u8>, LayerError> {
    let parts = name.split(|byte| *byte == b'/');
    let parts: Vec<&[u8]> = parts.filter(|part| !matches!(*part, b"" | b".")).collect();
    if parts.contains(&&b".."[..]) {
        return Err(LayerError::Format("the name leads out of the image"));
    }
    if parts.iter().any(|part| part.len() > COMPONENT_BYTES_MAX) {
        return Err(LayerError::Format("a component of the name has more than 255 bytes"));
    }
    if parts.len() > DEPTH_MAX {
        return Err(LayerError::Format("the name has more than 1,000 components"));
    }
    let path = parts.join(&b'/');
    if path.len() > PATH_BYTES_MAX {
        return Err(LayerError::Format("the name has more than 4,095 bytes"));
    }
    Ok(path)
}

/// Splits a path into its directory and its last component.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// Returns the meaning of a last component.
pub(super) fn meaning(base: &[u8]) -> Result<Meaning<'_>, LayerError> {
    if base == OPAQUE {
        return Ok(Meaning::Opaque);
    }
    if base.starts_with(SPECIAL) {
        return Ok(Meaning::Ignored);
    }
    match base.strip_prefix(WHITEOUT) {
        None => Ok(Meaning::Plain),
        Some(b"" | b"." | b"..") => Err(LayerError::Format("the whiteout names no file")),
        Some(removed) => Ok(Meaning::Whiteout(removed)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_and_stay_inside() {
        assert_eq!(normalize(b"/a//./b/").unwrap(), b"a/b");
        assert_eq!(normalize(b"./").unwrap(), b"");
        assert_eq!(normalize(b"a/..b/...").unwrap(), b"a/..b/...");
        let (long, deep) = ([b'a'; 256], b"a/".repeat(1001));
        for refused in
            [&b".."[..], b"../a", b"a/../b", b"/a/..", &long, &deep, &b"abc/".repeat(1024)]
        {
            assert!(normalize(refused).is_err());
        }
    }

    #[test]
    fn whiteouts_name_a_file() {
        assert_eq!(meaning(b".wh.a").unwrap(), Meaning::Whiteout(b"a"));
        assert_eq!(meaning(b".wh..wh..opq").unwrap(), Meaning::Opaque);
        assert_eq!(meaning(b".wh..wh.plnk").unwrap(), Meaning::Ignored);
        assert_eq!(meaning(b".wha").unwrap(), Meaning::Plain);
        for refused in [&b".wh."[..], b".wh..", b".wh..."] {
            assert!(meaning(refused).is_err(), "{refused:?}");
        }
    }
}
