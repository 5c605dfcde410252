//! The memory of another process, where it maps one file: what a VMM gives its guest.
//!
//! A private mapping of a file begins as the file's own pages, which all who map it share; the first write to a page makes a private
//! copy of it. `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst) tells which pages have one: exactly those that differ
//! from the file, if the file never changes.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// The unit in which memory is copied on write, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Entries of pagemap that are read at once.
const PAGEMAP_ENTRIES: usize = 64 * 1024;
const ENTRY_BYTES: u64 = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// The machine's memory, in bytes.
///
/// # Errors
///
/// Returns an error if the kernel does not say.
pub fn machine_bytes() -> io::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let kib = info.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    let kib: u64 = kib.trim().trim_end_matches(" kB").parse().map_err(io::Error::other)?;
    Ok(kib << 10)
}

/// The pages of a file that a process maps, in its memory.
#[derive(Debug)]
pub struct MappedFile {
    pid: u32,
    memory: File,
    mappings: Vec<Mapping>,
}

/// A part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    /// Where it begins in the process.
    address: u64,
    /// Where it begins in the file.
    offset: u64,
    bytes: u64,
}

impl MappedFile {
    /// Finds where the process maps `path`.
    ///
    /// # Errors
    ///
    /// Returns an error if it does not map the file, or this process may not look into its memory (see ptrace(2): it must be of the same
    /// user, and Yama's `ptrace_scope` 0, unless this one is root).
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

    /// The page numbers, in the file, of which the process has a copy of its own, in order.
    ///
    /// # Errors
    ///
    /// Returns an error if the process is gone.
    pub fn private_pages(&self) -> io::Result<Vec<Range<u64>>> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid))?;
        let mut runs = Vec::new();
        for mapping in &self.mappings {
            private_pages_of(&pagemap, mapping, &mut runs)?;
        }
        runs.sort_by_key(|run| run.start);
        Ok(runs)
    }

    /// Reads at a place of the file, as the process sees it.
    ///
    /// # Errors
    ///
    /// Returns an error if the place is not mapped or the process is gone.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let address = self.address(offset, buffer.len() as u64)?;
        self.memory.read_exact_at(buffer, address)
    }

    /// Writes at a place of the file, for this process alone if it maps the file privately.
    ///
    /// # Errors
    ///
    /// Returns an error if the place is not mapped or the process is gone.
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
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "not in the mapped file");
        mapping.map(|mapping| mapping.address + (offset - mapping.offset)).ok_or_else(outside)
    }
}

/// A line of `/proc/PID/maps` (proc_pid_maps(5)), if it maps this file: addresses, permissions, offset, device, inode, path. The inode
/// alone could be that of a file on another file system, and the device's number is none that stat(2) knows on some.
fn parse_mapping(line: &[u8], inode: u64, path: &Path) -> Option<Mapping> {
    let start = line.iter().position(|byte| *byte == b'/')?;
    // A line break in a path is the only thing that is escaped.
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

    /// Maps a file privately, writes to its pages 1, 2 and 5, reads page 7, says so, and answers each line with the first byte of page 2.
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
    fn pages_that_a_process_wrote_are_its_own_and_can_be_read_and_written() {
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
