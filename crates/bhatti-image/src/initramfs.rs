//! The initramfs: lohar, the kernel's modules, and empty directories to mount on, as a cpio
//! archive.
//!
//! The format is `newc` (Documentation/driver-api/early-userspace/buffer-format.rst). Each entry
//! has `070701`, a header of thirteen hex fields of eight digits, the name with its NUL, and the
//! content. Name and content are each padded to four bytes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::kernel::{LOADABLE_MODULES, MODULES};

const MODE_DIRECTORY: u32 = 0o040_755;
const MODE_PROGRAM: u32 = 0o100_755;
const MODE_FILE: u32 = 0o100_644;

/// The page size, and the number of bytes of the archive's last page that may be used. The
/// firmware of QEMU's microvm writes its ACPI tables into the last KiB of RAM, where the
/// initramfs ends, too. Without free space the two overlap, and the guest finds no devices.
const PAGE_BYTES: usize = 4096;
const LAST_PAGE_BYTES: usize = 512;

/// An initramfs could not be built.
#[derive(Debug, thiserror::Error)]
#[error("failed to read `{}` for the initramfs", path.display())]
pub struct InitramfsError {
    /// The file that could not be read.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Builds the archive from `lohar` and the modules in `kernel`, a directory that `bhatti setup`
/// made.
pub(crate) fn build(lohar: &Path, kernel: &Path) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Archive::default();
    for directory in ["dev", "sys", "root-disk"] {
        archive.add(directory, MODE_DIRECTORY, &[]);
    }
    archive.add("lohar", MODE_PROGRAM, &fs::read(lohar).map_err(failed(lohar))?);
    archive.add_directory(MODULES, &kernel.join(MODULES))?;
    let loadable = kernel.join(LOADABLE_MODULES);
    if loadable.exists() {
        archive.add_directory(LOADABLE_MODULES, &loadable)?;
    }
    Ok(archive.finish())
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> InitramfsError {
    let path = path.to_owned();
    move |source| InitramfsError { path, source }
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    /// Adds a directory and the files in it, sorted by name.
    fn add_directory(&mut self, name: &str, directory: &Path) -> Result<(), InitramfsError> {
        self.add(name, MODE_DIRECTORY, &[]);
        let entries = fs::read_dir(directory).map_err(failed(directory))?;
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files {
            let name = format!("{name}/{}", file.file_name().unwrap_or_default().to_string_lossy());
            self.add(&name, MODE_FILE, &fs::read(&file).map_err(failed(&file))?);
        }
        Ok(())
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = if mode == MODE_DIRECTORY { 2 } else { 1 };
        let mode = mode as usize;
        // inode, mode, uid, gid, links, mtime, size, device (2), rdevice (2), name with NUL,
        // checksum
        let fields =
            [self.entries, mode, 0, 0, links, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        let padded = self.bytes.len().next_multiple_of(to);
        self.bytes.resize(padded, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.pad(PAGE_BYTES);
        let padded = self.bytes.len() + LAST_PAGE_BYTES;
        self.bytes.resize(padded, 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_leaves_room_in_its_last_page() {
        let directory = tempfile::tempdir().unwrap();
        for length in [0, 1, 3500, 4096, 10_000] {
            let lohar = directory.path().join("lohar");
            fs::write(&lohar, vec![7; length]).unwrap();
            fs::create_dir_all(directory.path().join("modules")).unwrap();

            let archive = build(&lohar, directory.path()).unwrap();

            assert_eq!(archive.len() % PAGE_BYTES, LAST_PAGE_BYTES, "lohar of {length} bytes");
        }
    }

    #[test]
    fn archive_has_all_entries_in_newc_format() {
        let directory = tempfile::tempdir().unwrap();
        let lohar = directory.path().join("lohar");
        fs::write(&lohar, b"program").unwrap();
        for file in ["modules/00-a.ko", "loadable-modules/b.ko.xz"] {
            let file = directory.path().join(file);
            fs::create_dir(file.parent().unwrap()).unwrap();
            fs::write(file, b"a module").unwrap();
        }

        let archive = build(&lohar, directory.path()).unwrap();

        let names: Vec<_> = names(&archive);
        assert_eq!(
            names,
            [
                "dev",
                "sys",
                "root-disk",
                "lohar",
                "modules",
                "modules/00-a.ko",
                "loadable-modules",
                "loadable-modules/b.ko.xz",
                "TRAILER!!!"
            ]
        );
    }

    /// Reads the names in an archive by the rules of its format.
    fn names(archive: &[u8]) -> Vec<String> {
        let (mut at, mut names) = (0, Vec::new());
        while names.last().is_none_or(|name| name != "TRAILER!!!") {
            let field = |index: usize| {
                let text =
                    std::str::from_utf8(&archive[at + 6 + index * 8..at + 14 + index * 8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(&archive[at..at + 6], b"070701");
            let (size, name_length) = (field(6), field(11));
            let name = &archive[at + 110..at + 110 + name_length - 1];
            names.push(String::from_utf8(name.to_vec()).unwrap());
            at = (at + 110 + name_length).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
        }
        names
    }
}
