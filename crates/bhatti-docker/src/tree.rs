//! Reads the tree of a root file system from its disk image, without mounting it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ext4_view::{Ext4, FileType, Metadata};
use tar::{Builder, EntryType, Header};

/// Writes the tree of the ext4 file system `disk` as a tar archive. Skips devices, sockets and
/// pipes: a container has its own.
pub(crate) fn write_tar(disk: &Path, to: impl Write) -> io::Result<()> {
    let disk = Ext4::load(Box::new(File::open(disk)?))?;
    let mut archive = Builder::new(to);
    let mut directories = vec![ext4_view::PathBuf::new("/")];
    while let Some(directory) = directories.pop() {
        for entry in disk.read_dir(&directory)? {
            let entry = entry?;
            if [b".".as_slice(), b".."].contains(&entry.file_name().as_ref()) {
                continue;
            }
            let path = entry.path();
            let metadata = entry.metadata()?;
            append(&disk, &path, &metadata, &mut archive)?;
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    archive.into_inner()?.flush()
}

fn append<W: Write>(
    disk: &Ext4,
    path: &ext4_view::PathBuf,
    metadata: &Metadata,
    archive: &mut Builder<W>,
) -> io::Result<()> {
    let name = std_path(path.as_ref());
    let name = name.strip_prefix("/").unwrap_or(name);
    let mut header = header(metadata);
    match metadata.file_type() {
        FileType::Regular => {
            header.set_entry_type(EntryType::Regular);
            header.set_size(metadata.len());
            archive.append_data(&mut header, name, disk.open(path)?)
        }
        FileType::Directory => {
            header.set_entry_type(EntryType::Directory);
            archive.append_data(&mut header, name, io::empty())
        }
        FileType::Symlink => {
            header.set_entry_type(EntryType::Symlink);
            let target = disk.read_link(path)?;
            archive.append_link(&mut header, name, std_path(target.as_ref()))
        }
        _ => Ok(()),
    }
}

fn header(metadata: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(u32::from(metadata.mode()) & 0o7777);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.modified().seconds()).unwrap_or(0));
    header.set_size(0);
    header
}

fn std_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use tar::Archive;

    use super::*;

    #[tokio::test]
    async fn archive_has_the_whole_tree_except_devices_sockets_and_pipes() {
        let place = tempfile::tempdir().unwrap();
        let (tree, disk) = (place.path().join("tree"), place.path().join("disk.ext4"));
        let long = format!("usr/{}/{}", "d".repeat(90), "f".repeat(90));
        fs::create_dir_all(tree.join(&long).parent().unwrap()).unwrap();
        fs::write(tree.join(&long), "deep").unwrap();
        fs::write(tree.join("large"), vec![7; 3 << 20]).unwrap();
        fs::write(tree.join("suid"), "").unwrap();
        fs::set_permissions(tree.join("suid"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::hard_link(tree.join("large"), tree.join("same")).unwrap();
        symlink("../nowhere", tree.join("usr/link")).unwrap();
        let pipe = rustix::fs::FileType::Fifo;
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, tree.join("pipe"), pipe, mode, 0).unwrap();
        fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        let mut make = bhatti_host::process::command("mke2fs");
        make.args(["-q", "-t", "ext4", "-d"]).args([&tree, &disk]);
        assert!(make.status().await.unwrap().success());

        let mut archive = Vec::new();
        write_tar(&disk, &mut archive).unwrap();

        let mut found = BTreeMap::new();
        for entry in Archive::new(&archive[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().to_string_lossy().trim_end_matches('/').to_owned();
            let link = entry.link_name().unwrap().map(|link| link.into_owned());
            let (kind, mode) = (entry.header().entry_type(), entry.header().mode().unwrap());
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            found.insert(path, (kind, mode, link, content));
        }
        assert_eq!(found[&long].3, b"deep");
        assert!(found["large"].3 == vec![7; 3 << 20] && found["same"].3 == found["large"].3);
        assert_eq!((found["suid"].0, found["suid"].1), (EntryType::Regular, 0o4755));
        assert_eq!(found["usr/link"].2.as_deref(), Some(Path::new("../nowhere")));
        assert_eq!(found["usr"].0, EntryType::Directory);
        assert!(!found.contains_key("pipe"));
    }

    #[test]
    fn file_that_is_not_ext4_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, vec![0; 1 << 20]).unwrap();
        assert!(write_tar(file.path(), Vec::new()).is_err());
        assert!(write_tar(Path::new("/nowhere"), Vec::new()).is_err());
    }
}
