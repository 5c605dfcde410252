//! Directories of this machine as tar archives.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use tar::{Archive, Builder, EntryType};

/// Writes a tree as a tar archive, with links as links. Leaves out what is not wanted: `wanted`
/// gets a path and whether it is a directory. Returns the paths of the sockets, pipes and devices,
/// which an archive for a sandbox cannot have.
pub(crate) fn pack(
    directory: &Path,
    writer: impl Write,
    wanted: impl Fn(&Path, bool) -> bool,
) -> io::Result<Vec<String>> {
    let mut archive = Builder::new(writer);
    archive.follow_symlinks(false);
    archive.append_dir(".", directory)?;
    let mut skipped = Vec::new();
    let mut levels = vec![fs::read_dir(directory)?];
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.next() else {
            levels.pop();
            continue;
        };
        let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        if !wanted(&path, kind.is_dir()) {
            continue;
        }
        let name = path.strip_prefix(directory).map_err(io::Error::other)?;
        if kind.is_dir() {
            archive.append_dir(name, &path)?;
            levels.push(fs::read_dir(&path)?);
        } else if kind.is_file() || kind.is_symlink() {
            archive.append_path_with_name(&path, name)?;
        } else {
            skipped.push(path.display().to_string());
        }
    }
    archive.into_inner()?.flush()?;
    Ok(skipped)
}

/// Unpacks an archive of a guest into a directory. Returns the names of entries that are neither
/// file, directory nor link, which are left out. The archive is not trusted: entries whose names
/// lead outside of the directory are left out, too (see [`tar::Entry::unpack_in`]).
pub(super) fn unpack(reader: impl Read, directory: &Path) -> io::Result<Vec<String>> {
    let mut archive = Archive::new(reader);
    archive.set_overwrite(true);
    let (mut skipped, mut directories) = (Vec::new(), Vec::new());
    for entry in archive.entries()? {
        let mut entry = entry?;
        match entry.header().entry_type() {
            // Directories are unpacked last: their own permissions may forbid writing entries into
            // them.
            EntryType::Directory => directories.push(entry),
            EntryType::Link => {
                make_room_for_link(directory, &entry.path()?)?;
                entry.unpack_in(directory)?;
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                skipped.push(entry.path()?.display().to_string());
            }
            _ => drop(entry.unpack_in(directory)?),
        }
    }
    // Subdirectories before their parents.
    directories.sort_by(|one, other| other.path_bytes().cmp(&one.path_bytes()));
    for mut entry in directories {
        entry.unpack_in(directory)?;
    }
    Ok(skipped)
}

/// Removes the file that a hard link would replace, such as one from an earlier copy. Removes
/// nothing outside of the directory.
fn make_room_for_link(directory: &Path, name: &Path) -> io::Result<()> {
    let is_plain = name
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir));
    let (Some(parent), Some(file)) = (name.parent(), name.file_name()) else { return Ok(()) };
    if !is_plain {
        return Ok(());
    }
    // A link in the parent's path could lead outside.
    let Ok(parent) = directory.join(parent).canonicalize() else { return Ok(()) };
    if !parent.starts_with(directory.canonicalize()?) {
        return Ok(());
    }
    match fs::remove_file(parent.join(file)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A directory with a file, a link to it, a hard link of it, an empty directory, and a socket.
    fn tree() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        let at = |name: &str| tree.path().join(name);
        fs::create_dir_all(at("a/empty")).unwrap();
        fs::write(at("a/file"), "content").unwrap();
        fs::hard_link(at("a/file"), at("hard")).unwrap();
        std::os::unix::fs::symlink("a/file", at("soft")).unwrap();
        drop(UnixListener::bind(at("socket")).unwrap());
        tree
    }

    #[test]
    fn pack_leaves_out_sockets_and_keeps_all_other_entries() {
        let (tree, place) = (tree(), tempfile::tempdir().unwrap());
        let mut archive = Vec::new();

        let skipped = pack(tree.path(), &mut archive, |_, _| true).unwrap();

        assert_eq!(skipped, [tree.path().join("socket").display().to_string()]);
        assert_eq!(unpack(&archive[..], place.path()).unwrap(), Vec::<String>::new());
        assert_eq!(fs::read_to_string(place.path().join("soft")).unwrap(), "content");
        assert!(place.path().join("a/empty").is_dir());
        assert_eq!(fs::read_to_string(place.path().join("hard")).unwrap(), "content");
    }

    fn archive_of_links() -> Vec<u8> {
        let mut archive = Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(7);
        archive.append_data(&mut header, "h/a", &b"content"[..]).unwrap();
        header.set_size(0);
        header.set_entry_type(EntryType::Link);
        archive.append_link(&mut header, "h/b", "h/a").unwrap();
        header.set_entry_type(EntryType::Fifo);
        archive.append_data(&mut header, "h/pipe", io::empty()).unwrap();
        archive.into_inner().unwrap()
    }

    #[test]
    fn hard_links_can_be_unpacked_twice_and_pipes_are_left_out() {
        let place = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let skipped = unpack(&archive_of_links()[..], place.path()).unwrap();

            assert_eq!(skipped, ["h/pipe"]);
            let inode = |name: &str| fs::metadata(place.path().join(name)).unwrap().ino();
            assert_eq!(inode("h/a"), inode("h/b"));
            assert!(!place.path().join("h/pipe").exists());
        }
    }

    /// Returns an archive that no honest agent would make. The `tar` crate refuses to write such
    /// names, so they are written into the header's bytes.
    fn hostile_archive() -> Vec<u8> {
        let mut archive = Builder::new(Vec::new());
        let mut add = |name: &str, kind: EntryType, link: &str| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            header.set_mode(0o644);
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            archive.append(&header, io::empty()).unwrap();
        };
        add("../outside", EntryType::Regular, "");
        add("/inside", EntryType::Regular, "");
        add("up", EntryType::Symlink, "..");
        add("up/through", EntryType::Regular, "");
        archive.into_inner().unwrap()
    }

    #[test]
    fn hostile_archive_writes_nothing_outside_its_directory() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("directory");
        fs::create_dir(&directory).unwrap();

        unpack(&hostile_archive()[..], &directory).unwrap_err();

        assert!(directory.join("inside").exists() && !Path::new("/inside").exists());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }

    #[test]
    fn hard_link_below_a_link_to_outside_removes_nothing_there() {
        let (place, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("b"), "untouched").unwrap();
        std::os::unix::fs::symlink(outside.path(), place.path().join("h")).unwrap();

        drop(unpack(&archive_of_links()[..], place.path()));

        assert_eq!(fs::read_to_string(outside.path().join("b")).unwrap(), "untouched");
        assert!(!outside.path().join("a").exists());
    }
}
