//! The memory of a QEMU process: its private pages, and all pages.
//!
//! A full memory is a sparse file of the guest's whole size, which VMs map. For diffs, see
//! [`bhatti_vmm::write_pages`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bhatti_host::memory::{MappedFile, PAGE_BYTES};
use bhatti_host::{disk, durable};
use bhatti_vmm::{PAGE, piece_bytes, pieces, read_pages, write_pages};

const ZEROES: [u8; PAGE] = [0; PAGE];

/// Writes the private pages of a VM's memory to `path`. Returns their size in bytes, and the
/// file's hash.
pub(crate) fn write_diff(memory: &MappedFile, path: &Path) -> io::Result<(u64, blake3::Hash)> {
    write_pages(path, &memory.private_pages()?, |bytes, at| memory.read_at(bytes, at))
}

/// Writes the pages in `path` to a VM's memory. Returns the file's hash.
pub(crate) fn load_diff(memory: &MappedFile, path: &Path) -> io::Result<blake3::Hash> {
    read_pages(path, |bytes, at| memory.write_at(bytes, at))
}

/// Writes all nonzero pages of a VM's memory to `path`. `base` is the file that the VM maps.
/// Returns the size of the pages in bytes, and a hash of the pages with their offsets.
pub(crate) fn write_full(
    memory: &MappedFile,
    base: &Path,
    path: &Path,
) -> io::Result<(u64, blake3::Hash)> {
    let base = File::open(base)?;
    let size = base.metadata()?.len();
    let file = durable::create_sealed(path)?;
    file.set_len(size)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut written = 0;
    let mut buffer = vec![0; PAGE * 256];
    for run in holding_something(memory, &base)? {
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

/// Returns the size of a VM's private pages, and the maximum size of a full snapshot's pages, in
/// bytes.
pub(crate) fn measure(memory: &MappedFile, base: &Path) -> io::Result<(u64, u64)> {
    let bytes =
        |runs: &[Range<u64>]| runs.iter().map(|run| run.end - run.start).sum::<u64>() * PAGE_BYTES;
    let private = bytes(&memory.private_pages()?);
    let base = File::open(base)?;
    let all = bytes(&holding_something(memory, &base)?);
    Ok((private, all))
}

/// Returns the pages that may hold data: the VM's private pages, and the pages that its base has.
fn holding_something(memory: &MappedFile, base: &File) -> io::Result<Vec<Range<u64>>> {
    let mut runs = memory.private_pages()?;
    let mut at = 0;
    while let Some(Range { start, end }) = disk::next_data(base, at)? {
        runs.push(start / PAGE_BYTES..end.div_ceil(PAGE_BYTES));
        at = end;
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
