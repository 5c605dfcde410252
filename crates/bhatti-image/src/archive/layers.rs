//! Flattens the layers of an image into one tar.
//!
//! A layer is a tar of the files that it adds or changes. A whiteout (`.wh.NAME`) removes a name
//! of the layers below it, and `.wh..wh..opq` removes everything that they have in its directory.
//! Source: the OCI image specification, `layer.md`.
//!
//! The layers are read twice: from the top down, to decide which entries are hidden by layers
//! above; then from the bottom up, to copy the other entries in order. Unpacking the result once
//! keeps the protection of `tar` against links that lead out of the root. Unpacking layer over
//! layer would lose it.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use tar::{Archive, Builder, Entry, EntryType, Header};

use super::{ArchiveError, Bounded, Part, bad, check_extensions, explain};

/// The remaining budget for the entries of all layers, whose names are kept in memory.
#[derive(Clone, Copy)]
struct KnownLeft {
    entries: usize,
    /// Bytes of the entries' names and of the targets of hard links.
    name_bytes: usize,
}

const KNOWN_MAX: KnownLeft = KnownLeft { entries: 1_000_000, name_bytes: 256 << 20 };

const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// The extension with the true name of a sparse file. The entry itself has another name.
const SPARSE_NAME: &str = "GNU.sparse.name";

impl KnownLeft {
    /// Counts an entry whose names have `name_bytes` bytes.
    fn take(&mut self, name_bytes: usize) -> Result<(), ArchiveError> {
        let entries = self
            .entries
            .checked_sub(1)
            .ok_or_else(|| bad(format!("the image has more than {} files", KNOWN_MAX.entries)))?;
        let name_bytes = self.name_bytes.checked_sub(name_bytes).ok_or_else(|| {
            bad(format!("the names of its files take more than {} bytes", KNOWN_MAX.name_bytes))
        })?;
        *self = Self { entries, name_bytes };
        Ok(())
    }
}

/// How an entry is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Copy,
    Skip,
    /// Copied under this name, because a hard link to the entry stays and the entry's own name
    /// does not.
    Rename(String),
    /// Copied as a hard link to this name instead of its own target.
    Link(String),
}

/// The names of all layers above the current one.
#[derive(Debug, Default)]
struct Above {
    /// Names of directories.
    directories: HashSet<String>,
    /// Names of everything else, and removed names.
    others: HashSet<String>,
    /// Directories whose content in lower layers is removed.
    opaque: HashSet<String>,
}

impl Above {
    /// Whether an entry of a lower layer is hidden.
    fn hides(&self, name: &str, is_directory: bool) -> bool {
        if self.others.contains(name) || (!is_directory && self.directories.contains(name)) {
            return true;
        }
        let mut parent = name;
        loop {
            parent = parent.rsplit_once('/').map_or("", |(parent, _)| parent);
            if self.opaque.contains(parent) || (!parent.is_empty() && self.others.contains(parent))
            {
                return true;
            }
            if parent.is_empty() {
                return false;
            }
        }
    }
}

/// One entry of a layer, with the fields that hiding needs.
#[derive(Debug)]
struct Listed {
    name: String,
    kind: EntryType,
    /// Target of a hard link.
    target: Option<String>,
}

/// Merges the layers, lowest first, into one tar of at most `limit` bytes.
///
/// # Errors
///
/// Returns an error that names the layer's fault.
pub(super) fn flatten(layers: &[Part<'_>], flat: &File, limit: u64) -> Result<(), ArchiveError> {
    let (mut above, mut actions) = (Above::default(), Vec::new());
    let mut known_left = KNOWN_MAX;
    // One budget for all layers together, because an image may name a layer many times.
    let budget = || Rc::new(Cell::new(limit));
    let (checked, looked_at, copied) = (budget(), budget(), budget());
    for layer in layers.iter().rev() {
        check_extensions(open(layer, &checked)?.into_inner())
            .map_err(|error| explain(error, limit))?;
        let known = read(layer, limit, &looked_at, &mut known_left)?;
        actions.push(decide(&known, &above));
        add(known, &mut above);
    }
    let mut builder = Builder::new(flat);
    for (layer, actions) in layers.iter().zip(actions.into_iter().rev()) {
        let mut archive = open(layer, &copied)?;
        let found = archive.entries().map_err(|error| explain(error, limit))?;
        for (entry, action) in found.zip(actions) {
            let entry = entry.map_err(|error| explain(error, limit))?;
            copy(entry, action, &mut builder).map_err(|error| explain(error, limit))?;
        }
    }
    builder.finish().map_err(ArchiveError::File)
}

fn open<'file>(
    layer: &Part<'file>,
    left: &Rc<Cell<u64>>,
) -> Result<Archive<Box<dyn Read + 'file>>, ArchiveError> {
    let left = Rc::clone(left);
    let bounded: Box<dyn Read + 'file> = Box::new(Bounded { inner: layer.decompressed()?, left });
    Ok(Archive::new(bounded))
}

/// Reads the entries of one layer.
fn read(
    layer: &Part<'_>,
    limit: u64,
    left: &Rc<Cell<u64>>,
    known_left: &mut KnownLeft,
) -> Result<Vec<Listed>, ArchiveError> {
    let mut archive = open(layer, left)?;
    let mut known = Vec::new();
    for entry in archive.entries().map_err(|error| explain(error, limit))? {
        let mut entry = entry.map_err(|error| explain(error, limit))?;
        let name = name_of(&mut entry).map_err(|error| explain(error, limit))?;
        let name = normal(&name)?;
        let kind = entry.header().entry_type();
        let target = match entry.link_name_bytes() {
            Some(target) if kind == EntryType::Link => Some(normal(&target)?),
            _ => None,
        };
        known_left.take(name.len() + target.as_ref().map_or(0, String::len))?;
        known.push(Listed { name, kind, target });
    }
    Ok(known)
}

/// Decides how each entry of a layer is copied.
fn decide(known: &[Listed], above: &Above) -> Vec<Action> {
    let stays = |entry: &Listed| {
        let base = entry.name.rsplit('/').next().unwrap_or_default();
        let is_left_out =
            matches!(entry.kind, EntryType::Char | EntryType::Block | EntryType::XGlobalHeader);
        !base.starts_with(WHITEOUT)
            && !is_left_out
            && !above.hides(&entry.name, entry.kind == EntryType::Directory)
    };
    // Hidden files, and for each the first visible hard link to it, its heir.
    let hidden: HashSet<&str> = known
        .iter()
        .filter(|it| it.kind.is_file() && !stays(it))
        .map(|it| it.name.as_str())
        .collect();
    let mut heirs: HashMap<&str, &str> = HashMap::new();
    for entry in known.iter().filter(|entry| stays(entry)) {
        if let Some(target) = entry.target.as_deref().filter(|target| hidden.contains(target)) {
            heirs.entry(target).or_insert(&entry.name);
        }
    }
    let action = |entry: &Listed| {
        if !stays(entry) {
            return heirs
                .get(entry.name.as_str())
                .map_or(Action::Skip, |heir| Action::Rename((*heir).to_owned()));
        }
        match entry.target.as_deref().and_then(|target| heirs.get(target)) {
            Some(heir) if *heir == entry.name => Action::Skip,
            Some(heir) => Action::Link((*heir).to_owned()),
            None => Action::Copy,
        }
    };
    known.iter().map(action).collect()
}

/// Adds the entries of a layer to the names that hide entries of lower layers.
fn add(known: Vec<Listed>, above: &mut Above) {
    for entry in known {
        let (parent, base) = entry.name.rsplit_once('/').unwrap_or(("", &entry.name));
        if base == OPAQUE {
            above.opaque.insert(parent.to_owned());
        } else if let Some(removed) = base.strip_prefix(WHITEOUT) {
            let removed =
                if parent.is_empty() { removed.to_owned() } else { format!("{parent}/{removed}") };
            above.others.insert(removed);
        } else if entry.kind == EntryType::Directory {
            above.directories.insert(entry.name);
        } else {
            above.others.insert(entry.name);
        }
    }
}

fn copy<R: Read>(
    mut entry: Entry<'_, R>,
    action: Action,
    builder: &mut Builder<&File>,
) -> std::io::Result<()> {
    let mut name = bytes(&normal(&entry.path_bytes()).map_err(std::io::Error::other)?);
    if name.is_empty() {
        name.push(b'.');
    }
    let mut target = entry.link_name_bytes().map(|target| target.into_owned());
    match action {
        Action::Copy => {}
        Action::Skip => return Ok(()),
        Action::Rename(heir) => name = bytes(&heir),
        Action::Link(heir) => target = Some(bytes(&heir)),
    }
    let extensions = extensions(&mut entry)?;
    builder.append_pax_extensions(
        extensions.iter().map(|(key, value)| (key.as_str(), value.as_slice())),
    )?;
    let mut header: Header = entry.header().clone();
    let path = path(&name);
    match (header.entry_type(), target) {
        (EntryType::Link | EntryType::Symlink, Some(target)) => {
            header.set_size(0);
            builder.append_link(&mut header, path, self::path(&target))
        }
        (kind, _) => {
            // The reader fills the holes of a sparse file.
            if kind == EntryType::GNUSparse {
                header.set_entry_type(EntryType::Regular);
            }
            header.set_size(entry.size());
            builder.append_data(&mut header, path, &mut entry)
        }
    }
}

/// Returns the extensions of an entry, without those whose values the new header has.
fn extensions<R: Read>(entry: &mut Entry<'_, R>) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut kept = Vec::new();
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        let key = String::from_utf8_lossy(extension.key_bytes()).into_owned();
        if !matches!(key.as_str(), "path" | "linkpath" | "size") {
            kept.push((key, extension.value_bytes().to_owned()));
        }
    }
    Ok(kept)
}

/// Returns the name of an entry. The name of a sparse file is in its extensions.
fn name_of<R: Read>(entry: &mut Entry<'_, R>) -> std::io::Result<Vec<u8>> {
    let sparse = extensions(entry)?.into_iter().find(|(key, _)| key == SPARSE_NAME);
    Ok(sparse.map_or_else(|| entry.path_bytes().into_owned(), |(_, name)| name))
}

/// Returns a name relative to the root, without `.` and repeated slashes.
fn normal(name: &[u8]) -> Result<String, ArchiveError> {
    // Names that are not UTF-8 stay distinct, which is all that the callers need.
    let text: String = name.iter().map(|&byte| char::from(byte)).collect();
    let parts: Vec<&str> =
        text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(bad(format!("`{}` leads out of the image", String::from_utf8_lossy(name))));
    }
    Ok(parts.join("/"))
}

/// The bytes of a name that [`normal`] returned.
fn bytes(name: &str) -> Vec<u8> {
    name.chars().map(|it| u8::try_from(u32::from(it)).unwrap_or(b'?')).collect()
}

/// Converts a name into a path, byte by byte.
fn path(name: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Seek, SeekFrom};

    use super::*;

    /// Makes a layer. A name that ends in `/` is a directory, `NAME -> TARGET` a symbolic link,
    /// and `NAME => TARGET` a hard link.
    fn layer(entries: &[(&str, &str)]) -> File {
        let mut builder = Builder::new(tempfile::tempfile().unwrap());
        for (name, content) in entries {
            let mut header = Header::new_gnu();
            header.set_mode(0o755);
            header.set_size(0);
            if let Some((name, target)) = name.split_once(" -> ") {
                header.set_entry_type(EntryType::Symlink);
                builder.append_link(&mut header, name, target).unwrap();
            } else if let Some((name, target)) = name.split_once(" => ") {
                header.set_entry_type(EntryType::Link);
                builder.append_link(&mut header, name, target).unwrap();
            } else if name.ends_with('/') {
                header.set_entry_type(EntryType::Directory);
                builder.append_data(&mut header, name, &b""[..]).unwrap();
            } else {
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, name, content.as_bytes()).unwrap();
            }
        }
        builder.into_inner().unwrap()
    }

    fn flat(layers: &[File], limit: u64) -> Result<File, ArchiveError> {
        let parts: Vec<Part<'_>> = layers.iter().map(|file| Part::whole(file).unwrap()).collect();
        let mut flat = tempfile::tempfile().unwrap();
        flatten(&parts, &flat, limit)?;
        flat.seek(SeekFrom::Start(0)).unwrap();
        Ok(flat)
    }

    /// The flattened tree as `tar` unpacks it: content of files, targets of links.
    fn unpacked(layers: &[File]) -> BTreeMap<String, String> {
        let mut archive = Archive::new(flat(layers, 1 << 20).unwrap());
        let root = tempfile::tempdir().unwrap();
        archive.unpack(root.path()).unwrap();
        let mut tree = BTreeMap::new();
        let mut left = vec![root.path().to_owned()];
        while let Some(directory) = left.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(root.path()).unwrap().display().to_string();
                if path.is_symlink() {
                    tree.insert(name, format!("-> {}", path.read_link().unwrap().display()));
                } else if path.is_dir() {
                    tree.insert(name, "directory".into());
                    left.push(path);
                } else {
                    tree.insert(name, std::fs::read_to_string(path).unwrap());
                }
            }
        }
        tree
    }

    fn tree(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
        entries.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect()
    }

    #[test]
    fn files_and_names_are_counted_over_all_layers() {
        let layers = [layer(&[("a", ""), ("b", "")]), layer(&[("b => a", ""), ("name", "")])];
        let read_all = |mut left: KnownLeft| {
            let budget = Rc::new(Cell::new(u64::MAX));
            layers.iter().try_for_each(|file| {
                read(&Part::whole(file).unwrap(), u64::MAX, &budget, &mut left).map(drop)
            })
        };

        read_all(KnownLeft { entries: 4, name_bytes: 8 }).unwrap();
        let entries = read_all(KnownLeft { entries: 3, name_bytes: 8 }).unwrap_err();
        let names = read_all(KnownLeft { entries: 4, name_bytes: 7 }).unwrap_err();

        assert!(entries.to_string().ends_with("more than 1000000 files"), "{entries}");
        assert!(names.to_string().ends_with("more than 268435456 bytes"), "{names}");
    }

    #[test]
    fn upper_layer_replaces_removes_and_hides() {
        let layers = [
            layer(&[
                ("./etc/", ""),
                ("./etc/a", "1"),
                ("./etc/b", "1"),
                ("var/", ""),
                ("var/old", "1"),
                ("opt/", ""),
                ("opt/tree/", ""),
                ("opt/tree/leaf", "1"),
                ("was-file", "1"),
                ("lib -> usr/lib", ""),
            ]),
            layer(&[
                ("etc/.wh.a", ""),
                ("etc/b", "2"),
                ("var/", ""),
                ("var/.wh..wh..opq", ""),
                ("var/new", "2"),
                ("opt/tree", "a file now"),
                ("was-file/", ""),
                ("was-file/inner", "2"),
            ]),
        ];

        assert_eq!(
            unpacked(&layers),
            tree(&[
                ("etc", "directory"),
                ("etc/b", "2"),
                ("var", "directory"),
                ("var/new", "2"),
                ("opt", "directory"),
                ("opt/tree", "a file now"),
                ("was-file", "directory"),
                ("was-file/inner", "2"),
                ("lib", "-> usr/lib"),
            ])
        );
    }

    #[test]
    fn removed_name_that_a_later_layer_adds_again_is_kept() {
        let layers = [layer(&[("f", "1")]), layer(&[(".wh.f", "")]), layer(&[("f", "3")])];
        assert_eq!(unpacked(&layers), tree(&[("f", "3")]));
    }

    #[test]
    fn leading_slash_of_a_name_is_dropped() {
        let mut header = Header::new_gnu();
        header.set_size(1);
        header.as_old_mut().name[..10].copy_from_slice(b"/ko-app/it");
        header.set_cksum();
        let mut builder = Builder::new(tempfile::tempfile().unwrap());
        builder.append(&header, &b"x"[..]).unwrap();
        let layers = [builder.into_inner().unwrap(), layer(&[("etc/", "")])];
        assert_eq!(
            unpacked(&layers),
            tree(&[("ko-app", "directory"), ("ko-app/it", "x"), ("etc", "directory")])
        );
    }

    #[test]
    fn hard_link_survives_removal_of_its_target() {
        let layers = [
            layer(&[("git", "program"), ("git-add => git", ""), ("git-rm => git", "")]),
            layer(&[(".wh.git", "")]),
        ];
        assert_eq!(unpacked(&layers), tree(&[("git-add", "program"), ("git-rm", "program")]));
    }

    #[test]
    fn attributes_and_long_names_are_kept() {
        let long = format!("{}/{}", "d".repeat(90), "n".repeat(200));
        let mut builder = Builder::new(tempfile::tempfile().unwrap());
        builder
            .append_pax_extensions([("SCHILY.xattr.security.capability", &b"\x01\0\0\x02"[..])])
            .unwrap();
        let mut header = Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o4755);
        builder.append_data(&mut header, &long, &b"x"[..]).unwrap();
        let layers = [builder.into_inner().unwrap(), layer(&[("other", "")])];

        let mut archive = Archive::new(flat(&layers, 1 << 20).unwrap());
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();

        assert_eq!(entry.path_bytes(), long.as_bytes());
        assert_eq!(entry.header().mode().unwrap(), 0o4755);
        let extensions = extensions(&mut entry).unwrap();
        assert_eq!(
            extensions,
            [("SCHILY.xattr.security.capability".to_owned(), b"\x01\0\0\x02".to_vec())]
        );
    }

    #[test]
    fn layer_that_leaves_the_root_or_exceeds_a_limit_is_refused() {
        let mut out = Builder::new(tempfile::tempfile().unwrap());
        let mut header = Header::new_gnu();
        header.set_size(0);
        header.as_old_mut().name[..5].copy_from_slice(b"a/../");
        header.set_cksum();
        out.append(&header, &b""[..]).unwrap();
        let error = flat(&[out.into_inner().unwrap()], 1 << 20).unwrap_err();
        assert!(error.to_string().contains("leads out of the image"), "{error}");

        let mut builder = Builder::new(tempfile::tempfile().unwrap());
        builder.append_pax_extensions([("comment", &vec![b'x'; 2 << 20][..])]).unwrap();
        let mut header = Header::new_gnu();
        header.set_size(0);
        builder.append_data(&mut header, "f", &b""[..]).unwrap();
        let error = flat(&[builder.into_inner().unwrap()], 16 << 20).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");

        // A layer that is named several times counts each time.
        let megabyte = layer(&[("f", &"0".repeat(1 << 20))]);
        let many: Vec<File> = (0..20).map(|_| megabyte.try_clone().unwrap()).collect();
        assert!(matches!(flat(&many, 16 << 20).unwrap_err(), ArchiveError::TooLarge { .. }));

        let mut bomb = tempfile::tempfile().unwrap();
        let mut gzip = flate2::write::GzEncoder::new(&mut bomb, flate2::Compression::fast());
        let mut zeros = layer(&[("zeros", &"0".repeat(4 << 20))]);
        zeros.seek(SeekFrom::Start(0)).unwrap();
        std::io::copy(&mut zeros, &mut gzip).unwrap();
        gzip.finish().unwrap();
        let error = flat(&[bomb], 1 << 20).unwrap_err();
        assert!(matches!(error, ArchiveError::TooLarge { .. }), "{error}");
    }
}
