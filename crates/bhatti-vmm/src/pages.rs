//! The file format of a diff's memory pages.
//!
//! ```text
//!  magic          16 bytes
//!  runs           u64, the number of runs
//!  first, count   u64 each, of every run, in pages
//!  pages          4096 bytes each, in the order of the runs
//! ```
//!
//! Numbers are little-endian. The format is a list, not a sparse file: a file system may support
//! only holes of more than a page, and a copy may have no holes.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::path::Path;

use bhatti_host::durable;
use bhatti_host::memory::PAGE_BYTES;

const MAGIC: &[u8; 16] = b"bhatti pages 1\n\0";

/// Number of pages that are copied at once.
const COPY_PAGES: u64 = 256;
/// Size of a page, in bytes.
pub const PAGE: usize = 4096;

/// Writes the pages of `runs` to a new file. `read` fills its buffer from a byte offset. Returns
/// the size of the pages, in bytes, and the file's hash.
///
/// # Errors
///
/// Returns an error if a page cannot be read or written.
pub fn write_pages(
    path: &Path,
    runs: &[Range<u64>],
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<(u64, blake3::Hash)> {
    let mut file = Hashing::new(BufWriter::with_capacity(1 << 20, durable::create_sealed(path)?));
    file.write_all(MAGIC)?;
    file.write_all(&(runs.len() as u64).to_le_bytes())?;
    for run in runs {
        file.write_all(&run.start.to_le_bytes())?;
        file.write_all(&(run.end - run.start).to_le_bytes())?;
    }
    let mut pages = 0;
    let mut buffer = vec![0; PAGE * 256];
    for piece in runs.iter().cloned().flat_map(pieces) {
        let bytes = &mut buffer[..piece_bytes(&piece)?];
        read(bytes, piece.start * PAGE_BYTES)?;
        file.write_all(bytes)?;
        pages += piece.end - piece.start;
    }
    file.flush()?;
    Ok((pages * PAGE_BYTES, file.hasher.finalize()))
}

/// Passes the pages of a file to `write`, in pieces, each with its byte offset. Returns the
/// file's hash: if the file is damaged, the hash differs from the expected one.
///
/// # Errors
///
/// Returns an error if the file is not a file of pages, or if a page cannot be read or written.
pub fn read_pages(
    path: &Path,
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<blake3::Hash> {
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
        runs.push(first..end.ok_or_else(|| bad("a run of pages that is out of range"))?);
    }
    let mut buffer = vec![0; PAGE * 256];
    for piece in runs.into_iter().flat_map(pieces) {
        let bytes = &mut buffer[..piece_bytes(&piece)?];
        file.read_exact(bytes)?;
        write(bytes, piece.start * PAGE_BYTES)?;
    }
    if file.read(&mut [0])? != 0 {
        return Err(bad("bytes after the last page"));
    }
    Ok(file.hasher.finalize())
}

/// Splits a run into pieces of at most the number of pages that are copied at once.
pub fn pieces(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = run.end;
    let step = usize::try_from(COPY_PAGES).unwrap_or(usize::MAX);
    run.step_by(step).map(move |start| start..end.min(start + COPY_PAGES))
}

/// Returns the number of bytes in a piece.
///
/// # Errors
///
/// Returns an error if the number does not fit in a `usize`.
pub fn piece_bytes(piece: &Range<u64>) -> io::Result<usize> {
    usize::try_from((piece.end - piece.start) * PAGE_BYTES).map_err(io::Error::other)
}

fn read_u64(file: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// A file whose bytes are hashed as they are read or written.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read_at_their_offsets_and_damage_is_detected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages");
        let runs = [1..2, 300..900];
        let byte_at = |at: u64| u8::try_from(at / PAGE_BYTES % 251).unwrap();
        let fill = |bytes: &mut [u8], at: u64| {
            for (page, number) in bytes.chunks_mut(PAGE).zip(0..) {
                page.fill(byte_at(at + number * PAGE_BYTES));
            }
            Ok(())
        };
        let (bytes, hash) = write_pages(&path, &runs, fill).unwrap();
        assert_eq!(bytes, 601 * PAGE_BYTES);

        let mut seen = 0;
        let check = |bytes: &[u8], at: u64| {
            for (page, number) in bytes.chunks(PAGE).zip(0..) {
                assert!(page.iter().all(|byte| *byte == byte_at(at + number * PAGE_BYTES)));
                seen += 1;
            }
            Ok(())
        };
        assert_eq!(read_pages(&path, check).unwrap(), hash);
        assert_eq!(seen, 601);

        let whole = std::fs::read(&path).unwrap();
        for at in [0, 20, 40, whole.len() / 2, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            assert!(read_pages(&path, |_, _| Ok(())).ok() != Some(hash), "{at}");
        }
        for length in [0, 15, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(read_pages(&path, |_, _| Ok(())).is_err(), "{length}");
        }
    }
}
