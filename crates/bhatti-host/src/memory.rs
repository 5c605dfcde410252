//! The memory of another process where it maps a file, as a VMM maps its guest's memory.
//!
//! A private mapping of a file begins as the file's own pages, which all processes that map the
//! file share. The first write to a page makes a private copy of it. `/proc/PID/pagemap`
//! (Documentation/admin-guide/mm/pagemap.rst) shows which pages have a private copy. If the file
//! never changes, only those pages can differ from it.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// The size of a page, the unit of copy-on-write, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Number of pagemap entries that one read takes.
const PAGEMAP_ENTRIES: usize = 64 * 1024;
const ENTRY_BYTES: u64 = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// The machine's memory, in bytes.
///
/// # Errors
///
/// Returns an error if `/proc/meminfo` does not have the value.
pub fn machine_bytes() -> io::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let kib = info.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    let kib: u64 = kib.trim().trim_end_matches(" kB").parse().map_err(io::Error::other)?;
    Ok(kib << 10)
}

/// A file that another process maps, with access to its pages in that process.
#[derive(Debug)]
pub struct MappedFile {
    pid: u32,
    memory: File,
    mappings: Vec<Mapping>,
}

/// A mapped part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    /// Start address in the process.
    address: u64,
    /// Start offset in the file.
    offset: u64,
    bytes: u64,
}

impl MappedFile {
    /// Finds where the process maps `path`.
    ///
    /// # Errors
    ///
    /// Returns an error if the process does not map the file, or if this process may not access
    /// its memory. ptrace(2) has the conditions: unless this process is root, both processes must
    /// be of the same user and Yama's `ptrace_scope` must be 0.
    pub fn open(pid: u32, path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let inode = fs::metadata(&path)?.ino();
        let maps = fs::read(format!("/proc/{pid}/maps"))?;
        let lines = maps.split(|byte| *byte == b'\n');
        let mappings: Vec<Mapping> =
            lines.filter_map(|line| parse_mapping(line, inode, &path)).collect();
        if mappings.is_empty() {
            let message = format!("process {pid} does not map {}", path.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Self { pid, memory, mappings })
    }

    /// Returns the numbers of the file's pages of which the process has a private copy, in order.
    ///
    /// # Errors
    ///
    /// Returns an error if the process has ended.
    pub fn private_pages(&self) -> io::Result<Vec<Range<u64>>> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid))?;
        let mut runs = Vec::new();
        for mapping in &self.mappings {
            private_pages_of(&pagemap, mapping, &mut runs)?;
        }
        runs.sort_by_key(|run| run.start);
        Ok(runs)
    }

    /// Reads from an offset in the file, as the process sees it.
    ///
    /// # Errors
    ///
    /// Returns an error if the range is not mapped or the process has ended.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let address = self.address(offset, buffer.len() as u64)?;
        self.memory.read_exact_at(buffer, address)
    }

    /// Writes at an offset in the file. If the process maps the file privately, only the process
    /// sees the change.
    ///
    /// # Errors
    ///
    /// Returns an error if the range is not mapped or the process has ended.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let address = self.address(offset, bytes.len() as u64)?;
        self.memory.write_all_at(bytes, address)
    }

    fn address(&self, offset: u64, bytes: u64) -> io::Result<u64> {
        let end = offset.checked_add(bytes);
        let holds = |mapping: &&Mapping| {
            mapping.offset <= offset && end.is_some_and(|end| end <= mapping.offset + mapping.bytes)
        };
        let mapping = self.mappings.iter().find(holds);
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "outside the mapped file");
        mapping.map(|mapping| mapping.address + (offset - mapping.offset)).ok_or_else(outside)
    }
}

/// Parses a line of `/proc/PID/maps` (proc_pid_maps(5)) if it maps this file. Its fields are
/// addresses, permissions, offset, device, inode and path. The inode alone could be that of a
/// file on another file system, and on some file systems stat(2) reports another device number
/// than the line has.
fn parse_mapping(line: &[u8], inode: u64, path: &Path) -> Option<Mapping> {
    let start = line.iter().position(|byte| *byte == b'/')?;
    // The kernel escapes only line breaks in a path.
    if line[start..] != *path.as_os_str().as_bytes() {
        return None;
    }
    let mut fields = std::str::from_utf8(&line[..start]).ok()?.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (offset, mapped) = (fields.nth(1)?, fields.nth(1)?);
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let address = hex(start)?;
    let mapping = Mapping { address, offset: hex(offset)?, bytes: hex(end)?.checked_sub(address)? };
    (mapped.parse() == Ok(inode)).then_some(mapping)
}

fn private_pages_of(
    pagemap: &File,
    mapping: &Mapping,
    runs: &mut Vec<Range<u64>>,
) -> io::Result<()> {
    let (first, pages) = (mapping.offset / PAGE_BYTES, mapping.bytes / PAGE_BYTES);
    let mut buffer = vec![0; PAGEMAP_ENTRIES * 8];
    let mut page = 0;
    while page < pages {
        let entries = (PAGEMAP_ENTRIES as u64).min(pages - page);
        let length = usize::try_from(entries * ENTRY_BYTES).map_err(io::Error::other)?;
        let place = (mapping.address / PAGE_BYTES + page) * ENTRY_BYTES;
        pagemap.read_exact_at(&mut buffer[..length], place)?;
        let (entries_read, _) = buffer[..length].as_chunks::<8>();
        for (entry, number) in entries_read.iter().zip(first + page..) {
            if is_private(u64::from_ne_bytes(*entry)) {
                match runs.last_mut() {
                    Some(run) if run.end == number => run.end += 1,
                    _ => runs.push(number..number + 1),
                }
            }
        }
        page += entries;
    }
    Ok(())
}

const fn is_private(entry: u64) -> bool {
    entry & SWAPPED != 0 || (entry & PRESENT != 0 && entry & OF_FILE == 0)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::Stdio;

    use super::*;

    /// Maps a file privately, writes to its pages 1, 2 and 5, and reads page 7. Then prints the
    /// first byte of page 2, and prints it again for each line of input.
    const MAPPER: &str = "
import mmap, sys
file = open(sys.argv[1], 'r+b')
memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
memory[4096] = 65; memory[8192] = 66; memory[5 * 4096] = 67; memory[7 * 4096]
print(chr(memory[8192]), flush=True)
for line in sys.stdin:
    print(chr(memory[8192]), flush=True)
";

    #[test]
    fn written_pages_are_private_and_can_be_read_and_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        fs::write(&path, vec![b'.'; 16 * 4096]).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a test in the crate that wraps it")]
        let mut mapper = std::process::Command::new("python3")
            .args(["-c", MAPPER])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(mapper.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "B");

        let mapped = MappedFile::open(mapper.id(), &path).unwrap();
        assert_eq!(mapped.private_pages().unwrap(), [1..3, 5..6]);
        let mut page = [0; 4096];
        mapped.read_at(&mut page, 5 * 4096).unwrap();
        assert_eq!((page[0], page[1]), (b'C', b'.'));
        mapped.write_at(b"Z", 8192).unwrap();
        mapped.write_at(b"Y", 9 * 4096).unwrap();
        assert_eq!(mapped.private_pages().unwrap(), [1..3, 5..6, 9..10]);
        assert!(mapped.read_at(&mut page, 15 * 4096 + 1).is_err(), "past the end");

        mapper.stdin.take().unwrap().write_all(b"again\n").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "Z");
        mapper.wait().unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![b'.'; 16 * 4096], "the file never changes");
        assert!(MappedFile::open(std::process::id(), &path).is_err(), "not mapped here");
    }
}
