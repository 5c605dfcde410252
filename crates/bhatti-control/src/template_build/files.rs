//! The files that steps of a template copy: an archive, and parts of it.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Builder, EntryType};

use crate::build_errors::TemplateBuildError;

/// Maximum number of entries of the archive.
const ENTRIES_MAX: usize = 200_000;

/// An archive of files that steps copy.
pub(super) struct StepFiles(File);

/// A part of the archive, as an archive that is to be unpacked into a directory.
pub(super) struct Part {
    /// The directory in the sandbox.
    pub(super) directory: String,
    /// The archive.
    pub(super) archive: File,
}

impl StepFiles {
    pub(super) fn new(archive: File) -> Self {
        Self(archive)
    }

    /// Returns a digest of a file, or of a directory's content: names, kinds, modes and bytes.
    /// Blocks on disk.
    pub(super) fn digest(&self, from: &str) -> Result<String, TemplateBuildError> {
        let mut entries = Vec::new();
        self.each(from, |name, entry| {
            let header = entry.header();
            let mut hash = blake3::Hasher::new();
            hash.update(&[header.entry_type().as_byte()]);
            hash.update(&(header.mode()? & 0o7777).to_le_bytes());
            hash.update(&entry.link_name_bytes().unwrap_or_default());
            io::copy(entry, &mut hash)?;
            entries.push((name.to_owned(), hash.finalize()));
            Ok(())
        })?;
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        let mut whole = blake3::Hasher::new();
        for (name, digest) in entries {
            let name = name.as_os_str().as_encoded_bytes();
            whole.update(&(name.len() as u64).to_le_bytes()).update(name).update(digest.as_bytes());
        }
        Ok(whole.finalize().to_hex().to_string())
    }

    /// Writes a file, or a directory's content, into `target`, as an archive that is unpacked at
    /// `to`. Blocks on disk.
    pub(super) fn part(
        &self,
        from: &str,
        to: &str,
        target: File,
    ) -> Result<Part, TemplateBuildError> {
        let mut archive = Builder::new(io::BufWriter::new(target));
        let mut single = None;
        self.each(from, |name, entry| {
            let mut header = entry.header().clone();
            let is_whole = name.as_os_str().is_empty();
            if is_whole && entry.header().entry_type().is_dir() {
                return Ok(());
            }
            let (directory, name) =
                if is_whole { place_of_file(from, to) } else { (to.to_owned(), name.to_owned()) };
            if is_whole {
                single = Some(directory);
            }
            match entry.link_name()? {
                Some(link) => archive.append_link(&mut header, name, link),
                None => archive.append_data(&mut header, name, entry),
            }
        })?;
        let mut archive =
            archive.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        archive.flush()?;
        archive.rewind()?;
        Ok(Part { directory: single.unwrap_or_else(|| to.to_owned()), archive })
    }

    /// Calls `each` with every entry at or below a path, and its name below that path.
    fn each(
        &self,
        from: &str,
        mut each: impl FnMut(&Path, &mut tar::Entry<'_, &File>) -> io::Result<()>,
    ) -> Result<(), TemplateBuildError> {
        let wanted = plain(Path::new(from));
        let wanted = wanted.ok_or_else(|| TemplateBuildError::Path(from.to_owned()))?;
        let (mut archive, mut found) = (&self.0, false);
        archive.rewind()?;
        let broken = |error: io::Error| TemplateBuildError::Archive(error.to_string());
        for (number, entry) in Archive::new(archive).entries().map_err(broken)?.enumerate() {
            let mut entry = entry.map_err(broken)?;
            if number >= ENTRIES_MAX {
                return Err(TemplateBuildError::Archive(format!(
                    "more than {ENTRIES_MAX} entries"
                )));
            }
            let kind = entry.header().entry_type();
            let is_known = matches!(
                kind,
                EntryType::Regular | EntryType::Directory | EntryType::Symlink | EntryType::Link
            );
            let name = entry.path().map_err(broken)?.into_owned();
            let Some(name) = plain(&name) else {
                return Err(TemplateBuildError::Archive(format!("entry `{}`", name.display())));
            };
            if let (true, Ok(below)) = (is_known, name.strip_prefix(&wanted)) {
                found = true;
                each(below, &mut entry).map_err(broken)?;
            }
        }
        if found || wanted.as_os_str().is_empty() {
            Ok(())
        } else {
            Err(TemplateBuildError::Missing(from.to_owned()))
        }
    }
}

/// Returns the directory and the name of a file that is copied to `to`.
fn place_of_file(from: &str, to: &str) -> (String, PathBuf) {
    let name = |path: &str| PathBuf::from(path.rsplit('/').next().unwrap_or_default());
    if let Some(directory) = to.strip_suffix('/') {
        let directory = if directory.is_empty() { "/" } else { directory };
        return (directory.to_owned(), name(from.trim_end_matches('/')));
    }
    let directory = to.rsplit_once('/').map_or("/", |(directory, _)| directory);
    let directory = if directory.is_empty() { "/" } else { directory };
    (directory.to_owned(), name(to))
}

/// Returns a path without `.`; `None` if it leads upward or is absolute.
fn plain(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(entries: &[(&str, &[u8])]) -> StepFiles {
        let mut archive = Builder::new(tempfile::tempfile().unwrap());
        for (name, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, name, *content).unwrap();
        }
        StepFiles::new(archive.into_inner().unwrap())
    }

    #[test]
    fn digest_is_that_of_the_copied_files_alone() {
        let one = files(&[("app/a", b"1"), ("app/b", b"2"), ("other", b"x")]);
        let same = files(&[("./app/b", b"2"), ("other", b"y"), ("app/a", b"1")]);
        let changed = files(&[("app/a", b"1"), ("app/b", b"3")]);
        assert_eq!(one.digest("app").unwrap(), same.digest("./app/").unwrap());
        assert_ne!(one.digest("app").unwrap(), changed.digest("app").unwrap());
        assert_ne!(one.digest(".").unwrap(), same.digest(".").unwrap());
        for from in ["none", "app/a/b"] {
            assert!(matches!(one.digest(from), Err(TemplateBuildError::Missing(_))), "{from}");
        }
        for from in ["../x", "/app"] {
            assert!(matches!(one.digest(from), Err(TemplateBuildError::Path(_))), "{from}");
        }
    }

    #[test]
    fn files_and_directories_are_put_where_they_belong() {
        let files = files(&[("app/a", b"1"), ("app/deep/b", b"2"), ("one", b"3")]);
        let part = |from: &str, to: &str| {
            let part = files.part(from, to, tempfile::tempfile().unwrap()).unwrap();
            let mut archive = Archive::new(part.archive);
            let names = archive
                .entries()
                .unwrap()
                .map(|entry| entry.unwrap().path().unwrap().display().to_string());
            (part.directory, names.collect::<Vec<_>>())
        };
        let expected = |directory: &str, names: &[&str]| {
            (directory.to_owned(), names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(part("app", "/srv"), expected("/srv", &["a", "deep/b"]));
        assert_eq!(part("one", "/srv/"), expected("/srv", &["one"]));
        assert_eq!(part("one", "/srv/two"), expected("/srv", &["two"]));
        assert_eq!(part("one", "/two"), expected("/", &["two"]));
        assert_eq!(part(".", "/"), expected("/", &["app/a", "app/deep/b", "one"]));
    }
}
