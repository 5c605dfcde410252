//! Memory files: complete ones, which VMs map, and Firecracker's diffs, sparse files in which
//! only the dirty pages are data.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bhatti_host::disk;
use bhatti_host::memory::PAGE_BYTES;
use bhatti_vmm::{PAGE, piece_bytes, pieces, read_pages, write_pages};
use rustix::fs::{FallocateFlags, fallocate};

const ZEROES: [u8; PAGE] = [0; PAGE];

/// Writes the data pages of a sparse file to a list, and removes the sparse file. Returns the
/// size of the pages in bytes, and the list's hash.
pub(crate) fn list_pages(sparse: &Path, list: &Path) -> io::Result<(u64, blake3::Hash)> {
    let file = File::open(sparse)?;
    let listed = write_pages(list, &data(&file)?, |bytes, at| file.read_exact_at(bytes, at))?;
    fs::remove_file(sparse)?;
    Ok(listed)
}

/// Creates a memory file from `base`, or from `size` zero bytes, and writes the pages of a list
/// over it. Returns the list's hash.
pub(crate) fn with_pages(
    base: Option<&Path>,
    size: u64,
    list: &Path,
    target: &Path,
) -> io::Result<blake3::Hash> {
    let file = start_from(base, size, target)?;
    read_pages(list, |bytes, at| match at.checked_add(bytes.len() as u64) {
        Some(end) if end <= size => file.write_all_at(bytes, at),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a page is outside of the memory")),
    })
}

/// Creates a memory file from `base`, and writes the data pages of a diff over it. Returns the
/// size of the pages in bytes.
pub(crate) fn with_diff(base: &Path, diff: &Path, target: &Path) -> io::Result<u64> {
    let diff = File::open(diff)?;
    let file = start_from(Some(base), diff.metadata()?.len(), target)?;
    let mut written = 0;
    each_piece(&diff, |bytes, at| {
        written += bytes.len() as u64;
        file.write_all_at(bytes, at)
    })?;
    Ok(written)
}

/// Punches holes in place of zero pages. Returns the size of the other pages in bytes.
pub(crate) fn dig_holes(path: &Path) -> io::Result<u64> {
    let file = File::options().read(true).write(true).open(path)?;
    let (mut kept, mut empty) = (0, 0..0);
    each_piece(&file, |bytes, at| {
        for (page, start) in bytes.chunks(PAGE).zip((at..).step_by(PAGE)) {
            let end = start + page.len() as u64;
            if page != &ZEROES[..page.len()] {
                kept += page.len() as u64;
            } else if empty.end == start {
                empty.end = end;
            } else {
                dig_hole(&file, &empty)?;
                empty = start..end;
            }
        }
        Ok(())
    })?;
    dig_hole(&file, &empty)?;
    Ok(kept)
}

/// Punches one hole for all adjacent pages: each hole takes the file system the same time.
fn dig_hole(file: &File, bytes: &Range<u64>) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(file, flags, bytes.start, bytes.end - bytes.start)?)
}

fn start_from(base: Option<&Path>, size: u64, target: &Path) -> io::Result<File> {
    match base {
        Some(base) if base.metadata()?.len() == size => disk::copy(base, target)?,
        Some(_) => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the base has the wrong size"));
        }
        None => File::create_new(target)?.set_len(size)?,
    }
    File::options().write(true).open(target)
}

/// Returns the runs of pages that are data.
fn data(file: &File) -> io::Result<Vec<Range<u64>>> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while let Some(Range { start, end }) = disk::next_data(file, at)? {
        runs.push(start / PAGE_BYTES..end.div_ceil(PAGE_BYTES));
        at = end;
    }
    Ok(runs)
}

fn each_piece(file: &File, mut act: impl FnMut(&[u8], u64) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for piece in data(file)?.into_iter().flat_map(pieces) {
        let bytes = &mut buffer[..piece_bytes(&piece)?];
        let at = piece.start * PAGE_BYTES;
        file.read_exact_at(bytes, at)?;
        act(bytes, at)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const SIZE: u64 = 8 << 20;

    fn sparse(path: &Path, pages: &[(u64, u8)]) {
        let file = File::create(path).unwrap();
        file.set_len(SIZE).unwrap();
        for (page, byte) in pages {
            file.write_all_at(&[*byte; PAGE], page * PAGE_BYTES).unwrap();
        }
    }

    #[test]
    fn diff_and_page_list_are_merged_without_changing_the_base() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let same =
            |one: &str, other: &str| fs::read(path(one)).unwrap() == fs::read(path(other)).unwrap();
        sparse(&path("base"), &[(1, 1), (2, 1), (7, 1), (2047, 1)]);
        sparse(&path("before"), &[(1, 1), (2, 1), (7, 1), (2047, 1)]);
        // A dirty page may be all zeros.
        sparse(&path("diff"), &[(2, 2), (7, 0), (1000, 2)]);
        sparse(&path("expected"), &[(1, 1), (2, 2), (1000, 2), (2047, 1)]);

        assert_eq!(
            with_diff(&path("base"), &path("diff"), &path("merged")).unwrap(),
            3 * PAGE_BYTES
        );
        assert!(same("merged", "expected") && same("base", "before"));

        let (bytes, hash) = list_pages(&path("diff"), &path("list")).unwrap();
        assert_eq!(bytes, 3 * PAGE_BYTES);
        assert!(!path("diff").exists());
        let found = with_pages(Some(&path("base")), SIZE, &path("list"), &path("listed")).unwrap();
        assert!(found == hash && same("listed", "expected") && same("base", "before"));
        with_pages(None, SIZE, &path("list"), &path("alone")).unwrap();
        sparse(&path("only"), &[(2, 2), (1000, 2)]);
        assert!(same("alone", "only"));
        for wrong in [SIZE / 2, SIZE * 2] {
            let made = with_pages(Some(&path("base")), wrong, &path("list"), &path("no"));
            assert!(made.is_err(), "{wrong}");
        }
        assert!(with_pages(None, PAGE_BYTES, &path("list"), &path("short")).is_err());
    }

    #[test]
    fn zero_pages_take_no_disk_space() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let mut content = vec![0; usize::try_from(SIZE).unwrap()];
        // In the middle of a piece, and on both sides of a boundary between pieces.
        for page in [5, 255, 256] {
            content[page * PAGE] = 1;
        }
        fs::write(&path, &content).unwrap();

        assert_eq!(dig_holes(&path).unwrap(), 3 * PAGE_BYTES);

        assert!(fs::read(&path).unwrap() == content);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20);
    }
}
