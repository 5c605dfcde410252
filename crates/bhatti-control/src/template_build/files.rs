//! The files that steps of a template copy: archives, and parts of them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use flate2::read::MultiGzDecoder;
use tar::{Archive, Builder, EntryType, Header};

use crate::build_errors::TemplateBuildError;

/// Maximum number of entries of the archive.
const ENTRIES_MAX: usize = 200_000;

/// Maximum length of what describes an entry, in bytes: its header, a long name, attributes.
const HEADER_BYTES_MAX: u64 = 1 << 20;

/// The first bytes of a gzip stream.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// An archive of files, and the directory that its names are below.
pub type FilesBelow = (PathBuf, File);

/// The archives of files that steps copy.
pub(super) struct StepFiles {
    archives: Vec<FilesBelow>,
    /// Maximum of the bytes that its files unpack to. A hole takes no space in the archive.
    bytes_max: u64,
    /// The files' digests, when a step has asked for one.
    digests: OnceLock<BTreeMap<PathBuf, blake3::Hash>>,
}

/// A part of the archive, as an archive that is to be unpacked into a directory.
pub(super) struct Part {
    /// The directory in the sandbox.
    pub(super) directory: String,
    /// The archive.
    pub(super) archive: File,
}

/// Reads an archive, up to a limit that is set anew for each entry.
struct Limited<'a> {
    archive: Box<dyn Read + 'a>,
    left: &'a Cell<u64>,
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            return Err(io::Error::other("the header of an entry is too long"));
        }
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let length = self.archive.read(&mut buffer[..most])?;
        self.left.set(left - length as u64);
        Ok(length)
    }
}

type Entry<'a, 'b> = tar::Entry<'a, Limited<'b>>;

impl StepFiles {
    /// `bytes_max` is the maximum of the bytes that the files unpack to. The archives may be
    /// compressed with gzip.
    pub(super) fn new(archives: Vec<FilesBelow>, bytes_max: u64) -> Self {
        Self { archives, bytes_max, digests: OnceLock::new() }
    }

    /// Returns a digest of a file, or of a directory's content: names, kinds, modes and bytes.
    /// Blocks on disk.
    pub(super) fn digest(&self, from: &str) -> Result<String, TemplateBuildError> {
        let wanted = wanted(from)?;
        let digests = match self.digests.get() {
            Some(digests) => digests,
            None => {
                let digests = self.digests()?;
                self.digests.get_or_init(|| digests)
            }
        };
        let (mut whole, mut found) = (blake3::Hasher::new(), wanted.as_os_str().is_empty());
        for (name, digest) in digests {
            let Ok(below) = name.strip_prefix(&wanted) else { continue };
            found = true;
            let name = below.as_os_str().as_encoded_bytes();
            whole.update(&(name.len() as u64).to_le_bytes()).update(name).update(digest.as_bytes());
        }
        if found {
            Ok(whole.finalize().to_hex().to_string())
        } else {
            Err(TemplateBuildError::Missing(from.to_owned()))
        }
    }

    /// Returns the digests of all entries.
    fn digests(&self) -> Result<BTreeMap<PathBuf, blake3::Hash>, TemplateBuildError> {
        let mut digests = BTreeMap::new();
        self.each(|name, _, entry| {
            let header = entry.header();
            let mut hash = blake3::Hasher::new();
            hash.update(&[header.entry_type().as_byte()]);
            hash.update(&(header.mode()? & 0o7777).to_le_bytes());
            hash.update(&entry.link_name_bytes().unwrap_or_default());
            io::copy(entry, &mut hash)?;
            digests.insert(name.to_owned(), hash.finalize());
            Ok(())
        })?;
        Ok(digests)
    }

    /// Writes a file, or a directory's content, into `target`, as an archive that is unpacked at
    /// `to`. Blocks on disk.
    pub(super) fn part(
        &self,
        from: &str,
        to: &str,
        target: File,
    ) -> Result<Part, TemplateBuildError> {
        let wanted = wanted(from)?;
        let mut archive = Builder::new(io::BufWriter::new(target));
        let (mut single, mut found) = (None, wanted.as_os_str().is_empty());
        self.each(|name, place, entry| {
            let Ok(below) = name.strip_prefix(&wanted) else { return Ok(()) };
            found = true;
            let kind = entry.header().entry_type();
            let is_whole = below.as_os_str().is_empty();
            if is_whole && kind.is_dir() {
                return Ok(());
            }
            let name = if is_whole {
                let (directory, name) = place_of_file(from, to);
                single = Some(directory);
                name
            } else {
                below.to_owned()
            };
            append(&mut archive, name, (&wanted, place), entry)
        })?;
        if !found {
            return Err(TemplateBuildError::Missing(from.to_owned()));
        }
        let mut archive =
            archive.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        archive.flush()?;
        archive.rewind()?;
        Ok(Part { directory: single.unwrap_or_else(|| to.to_owned()), archive })
    }

    /// Calls `each` with every file, directory and link, its name, and the directory that its
    /// archive's names are below. Leaves out what an archive for a sandbox cannot have: pipes and
    /// devices.
    fn each(
        &self,
        mut each: impl FnMut(&Path, &Path, &mut Entry<'_, '_>) -> io::Result<()>,
    ) -> Result<(), TemplateBuildError> {
        let (mut entries, mut bytes) = (0, 0_u64);
        for (place, file) in &self.archives {
            self.each_of((place, file), (&mut entries, &mut bytes), &mut each)?;
        }
        Ok(())
    }

    /// Calls `each` with what one archive has. Counts its entries, and the bytes that they unpack
    /// to.
    fn each_of(
        &self,
        (place, file): (&Path, &File),
        (entries, bytes): (&mut usize, &mut u64),
        mut each: impl FnMut(&Path, &Path, &mut Entry<'_, '_>) -> io::Result<()>,
    ) -> Result<(), TemplateBuildError> {
        let broken = |error: io::Error| TemplateBuildError::Archive(error.to_string());
        let invalid = |problem: String| Err(TemplateBuildError::Archive(problem));
        let left = Cell::new(HEADER_BYTES_MAX);
        let mut archive = Archive::new(Limited { archive: opened(file)?, left: &left });
        for entry in archive.entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            left.set(u64::MAX);
            *entries += 1;
            if *entries > ENTRIES_MAX {
                return invalid(format!("more than {ENTRIES_MAX} entries"));
            }
            *bytes = bytes.saturating_add(entry.size());
            if *bytes > self.bytes_max {
                return invalid(format!("files of more than {} bytes", self.bytes_max));
            }
            let name = entry.path().map_err(broken)?.into_owned();
            let Some(name) = plain(&name) else {
                return invalid(format!("entry `{}`", name.display()));
            };
            if is_copied(entry.header().entry_type()) {
                each(&place.join(name), place, &mut entry).map_err(broken)?;
            }
            // What is left of the content is not a part of the next header.
            io::copy(&mut entry, &mut io::sink()).map_err(broken)?;
            left.set(HEADER_BYTES_MAX);
        }
        Ok(())
    }
}

/// Returns a reader of an archive, which is decompressed if it begins so.
fn opened(mut file: &File) -> io::Result<Box<dyn Read + '_>> {
    let mut begin = Vec::new();
    file.rewind()?;
    file.take(GZIP.len() as u64).read_to_end(&mut begin)?;
    file.rewind()?;
    let file = io::BufReader::new(file);
    Ok(if begin == GZIP { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) })
}

fn is_copied(kind: EntryType) -> bool {
    is_file(kind) || kind.is_dir() || kind.is_symlink() || kind.is_hard_link()
}

fn is_file(kind: EntryType) -> bool {
    kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse()
}

/// Adds an entry to the archive of a part, whose names are below `wanted`. The names in the
/// entry's own archive are below `place`.
fn append(
    archive: &mut Builder<impl Write>,
    name: PathBuf,
    (wanted, place): (&Path, &Path),
    entry: &mut Entry<'_, '_>,
) -> io::Result<()> {
    let mut header = Header::new_gnu();
    let old = entry.header();
    let kind = old.entry_type();
    header.set_mode(old.mode()? & 0o7777);
    header.set_mtime(old.mtime().unwrap_or_default());
    header.set_entry_type(if is_file(kind) { EntryType::Regular } else { kind });
    header.set_size(if is_file(kind) { entry.size() } else { 0 });
    let no_target = || io::Error::other(format!("`{}` links to nothing", name.display()));
    if kind.is_symlink() {
        let target = entry.link_name()?.ok_or_else(no_target)?.into_owned();
        archive.append_link(&mut header, name, target)
    } else if kind.is_hard_link() {
        let target = entry.link_name()?.and_then(|target| plain(&target)).ok_or_else(no_target)?;
        let target = place.join(target);
        let below = target.strip_prefix(wanted).map_err(|_| {
            io::Error::other(format!("`{}` is a link to a file outside", name.display()))
        })?;
        archive.append_link(&mut header, &name, below)
    } else {
        archive.append_data(&mut header, name, entry)
    }
}

/// Returns the path that a copy names, without `.`.
fn wanted(from: &str) -> Result<PathBuf, TemplateBuildError> {
    plain(Path::new(from)).ok_or_else(|| TemplateBuildError::Path(from.to_owned()))
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
        StepFiles::new(vec![(PathBuf::new(), archive.into_inner().unwrap())], 1 << 20)
    }

    #[test]
    fn archives_have_directories_of_their_own_and_may_be_compressed() {
        let packed = |name: &str, kind: EntryType| {
            let mut archive = Builder::new(Vec::new());
            let mut header = Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(1);
            archive.append_data(&mut header, name, &b"x"[..]).unwrap();
            header.set_entry_type(kind);
            header.set_size(0);
            archive.append_link(&mut header, format!("{name}.link"), name).unwrap();
            archive.into_inner().unwrap()
        };
        let file = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            file
        };
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&packed("b", EntryType::Link)).unwrap();
        let archives = vec![
            (PathBuf::from("one"), file(&packed("a", EntryType::Symlink))),
            (PathBuf::from("two"), file(&gzip.finish().unwrap())),
        ];
        let files = StepFiles::new(archives, 1 << 20);

        let part = files.part("two", "/srv", tempfile::tempfile().unwrap()).unwrap();

        let mut archive = Archive::new(part.archive);
        let found = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            let link = entry.link_name().unwrap().map(|link| link.display().to_string());
            (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap(), link)
        });
        let expected = [("b", None), ("b.link", Some("b"))];
        let expected = expected.map(|(name, link)| (name.into(), 0o644, link.map(str::to_owned)));
        assert_eq!(found.collect::<Vec<_>>(), expected);
        assert_ne!(files.digest("one").unwrap(), files.digest("two").unwrap());
        assert!(files.digest("a").is_err() && files.digest("one/a").is_ok());
    }

    #[test]
    fn archives_that_take_too_much_memory_or_space_are_refused() {
        // A long name that has no end.
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        let mut archive = tempfile::tempfile().unwrap();
        archive.write_all(header.as_bytes()).unwrap();
        archive.set_len(1 << 40).unwrap();
        let error =
            StepFiles::new(vec![(PathBuf::new(), archive)], u64::MAX).digest(".").unwrap_err();
        assert!(error.to_string().contains("header of an entry"), "{error}");

        let large = files(&[("a", &[0; 700 << 10]), ("b", &[0; 700 << 10])]);
        let error = large.digest("a").unwrap_err();
        assert!(error.to_string().contains("more than 1048576 bytes"), "{error}");
    }

    #[tokio::test]
    async fn links_and_holes_are_copied() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        std::fs::create_dir(at("app")).unwrap();
        std::fs::write(at("app/one"), "1").unwrap();
        std::fs::hard_link(at("app/one"), at("app/two")).unwrap();
        std::os::unix::fs::symlink("one", at("app/three")).unwrap();
        File::create(at("app/hole")).unwrap().set_len(100 << 10).unwrap();
        let mut packed = bhatti_host::process::command("tar");
        packed.args(["--sparse", "--sort=name", "-C"]).arg(place.path());
        let packed = packed.args(["-cf"]).arg(at("a.tar")).arg("app").status().await.unwrap();
        assert!(packed.success());
        let files =
            StepFiles::new(vec![(PathBuf::new(), File::open(at("a.tar")).unwrap())], 1 << 20);

        let part = files.part("app", "/srv", tempfile::tempfile().unwrap()).unwrap();

        let mut archive = Archive::new(part.archive);
        let found = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            let link = entry.link_name().unwrap().map(|link| link.display().to_string());
            (entry.path().unwrap().display().to_string(), entry.size(), link)
        });
        let found: Vec<_> = found.collect();
        let link = |name: &str| Some(name.to_owned());
        let expected = [
            ("hole".to_owned(), 100 << 10, None),
            ("one".to_owned(), 1, None),
            ("three".to_owned(), 0, link("one")),
            ("two".to_owned(), 0, link("one")),
        ];
        assert_eq!(found, expected);
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
