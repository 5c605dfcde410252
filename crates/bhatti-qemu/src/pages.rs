//! Files of memory pages.
//!
//! A full memory is a sparse file of the guest's whole size, which VMs map. A diff is a list of pages:
//!
//! ```text
//!  magic          16 bytes
//!  runs           u64, how many
//!  first, count   u64 each, of every run, in pages
//!  pages          4096 bytes each, in the order of the runs
//! ```
//!
//! in little-endian. A list, not a sparse file: a file system may only know holes of more than a page.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bhatti_host::memory::{MappedFile, PAGE_BYTES};

const MAGIC: &[u8; 16] = b"bhatti pages 1\n\0";

/// Pages that are copied at once.
const COPY_PAGES: u64 = 256;
const PAGE: usize = 4096;
const ZEROES: [u8; PAGE] = [0; PAGE];

/// Writes the private pages of a VM's memory to `path`. Returns their bytes and the file's hash.
pub(crate) fn write_diff(memory: &MappedFile, path: &Path) -> io::Result<(u64, blake3::Hash)> {
    let runs = memory.private_pages()?;
    let mut file = Hashing::new(BufWriter::with_capacity(1 << 20, File::create_new(path)?));
    file.write_all(MAGIC)?;
    file.write_all(&(runs.len() as u64).to_le_bytes())?;
    for run in &runs {
        file.write_all(&run.start.to_le_bytes())?;
        file.write_all(&(run.end - run.start).to_le_bytes())?;
    }
    let mut pages = 0;
    let mut buffer = vec![0; PAGE * 256];
    for piece in runs.into_iter().flat_map(pieces) {
        let bytes = &mut buffer[..piece_bytes(&piece)?];
        memory.read_at(bytes, piece.start * PAGE_BYTES)?;
        file.write_all(bytes)?;
        pages += piece.end - piece.start;
    }
    file.flush()?;
    Ok((pages * PAGE_BYTES, file.hasher.finalize()))
}

/// Gives a VM the pages in `path`. Returns the file's hash: what it says of a damaged file is that it is not the expected one.
pub(crate) fn load_diff(memory: &MappedFile, path: &Path) -> io::Result<blake3::Hash> {
    let bad = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    let length = path.metadata()?.len();
    let mut file = Hashing::new(BufReader::with_capacity(1 << 20, File::open(path)?));
    let mut magic = [0; 16];
    file.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(bad("not a file of memory pages"));
    }
    let count = read_u64(&mut file)?;
    if count > length / 16 {
        return Err(bad("more runs than the file can hold"));
    }
    let mut runs = Vec::new();
    for _ in 0..count {
        let (first, count) = (read_u64(&mut file)?, read_u64(&mut file)?);
        let end = first.checked_add(count).filter(|end| end.checked_mul(PAGE_BYTES).is_some());
        runs.push(first..end.ok_or_else(|| bad("a run without an end"))?);
    }
    let mut buffer = vec![0; PAGE * 256];
    for piece in runs.into_iter().flat_map(pieces) {
        let bytes = &mut buffer[..piece_bytes(&piece)?];
        file.read_exact(bytes)?;
        memory.write_at(bytes, piece.start * PAGE_BYTES)?;
    }
    if file.read(&mut [0])? != 0 {
        return Err(bad("more than its pages"));
    }
    Ok(file.hasher.finalize())
}

/// Writes all memory of a VM to `path`, without its zeroes. `base` is the file that it maps. Returns the bytes of the pages, and a hash
/// of them with their places.
pub(crate) fn write_full(
    memory: &MappedFile,
    base: &Path,
    path: &Path,
) -> io::Result<(u64, blake3::Hash)> {
    let base = File::open(base)?;
    let size = base.metadata()?.len();
    let file = File::create_new(path)?;
    file.set_len(size)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut written = 0;
    let mut buffer = vec![0; PAGE * 256];
    for run in holding_something(memory, &base, size)? {
        for piece in pieces(run) {
            let bytes = &mut buffer[..piece_bytes(&piece)?];
            memory.read_at(bytes, piece.start * PAGE_BYTES)?;
            for (page, number) in bytes.chunks_exact(PAGE).zip(piece.start..) {
                if page != ZEROES {
                    let place = number * PAGE_BYTES;
                    hasher.update(&place.to_le_bytes());
                    hasher.update(page);
                    file.write_all_at(page, place)?;
                    written += PAGE_BYTES;
                }
            }
        }
    }
    Ok((written, hasher.finalize()))
}

/// How much of a VM's memory is its own, and how much there is at most to save, in bytes.
pub(crate) fn measure(memory: &MappedFile, base: &Path) -> io::Result<(u64, u64)> {
    let bytes =
        |runs: &[Range<u64>]| runs.iter().map(|run| run.end - run.start).sum::<u64>() * PAGE_BYTES;
    let private = bytes(&memory.private_pages()?);
    let base = File::open(base)?;
    let all = bytes(&holding_something(memory, &base, base.metadata()?.len())?);
    Ok((private, all))
}

/// The pages that may hold something: those that are the VM's own, and those that its base has.
fn holding_something(memory: &MappedFile, base: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut runs = memory.private_pages()?;
    let mut at = 0;
    while let Some(data) = seek(base, rustix::fs::SeekFrom::Data(at))? {
        // A file ends in a hole, if in nothing else.
        let hole = seek(base, rustix::fs::SeekFrom::Hole(data))?.unwrap_or(size);
        runs.push(data / PAGE_BYTES..hole.div_ceil(PAGE_BYTES));
        at = hole;
    }
    runs.sort_by_key(|run| run.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => merged.push(run),
        }
    }
    Ok(merged)
}

fn seek(file: &File, to: rustix::fs::SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Err(rustix::io::Errno::NXIO) => Ok(None),
        place => Ok(Some(place?)),
    }
}

fn pieces(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = run.end;
    let step = usize::try_from(COPY_PAGES).unwrap_or(usize::MAX);
    run.step_by(step).map(move |start| start..end.min(start + COPY_PAGES))
}

fn piece_bytes(piece: &Range<u64>) -> io::Result<usize> {
    usize::try_from((piece.end - piece.start) * PAGE_BYTES).map_err(io::Error::other)
}

fn read_u64(file: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// A file whose bytes are hashed on their way.
struct Hashing<F> {
    inner: F,
    hasher: blake3::Hasher,
}

impl<F> Hashing<F> {
    fn new(inner: F) -> Self {
        Self { inner, hasher: blake3::Hasher::new() }
    }
}

impl<F: Write> Write for Hashing<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..length]);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<F: Read> Read for Hashing<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..length]);
        Ok(length)
    }
}
