//! The tree of a root file system, out of its disk image and without mounting it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ext4_view::{Ext4, FileType, Metadata};
use tar::{Builder, EntryType, Header};

/// Writes the tree of the ext4 file system `disk` as a tar archive. Devices, sockets and pipes are left out: a container has its own.
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
