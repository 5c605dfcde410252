//! Names files by their content. The cost grows with a file's data, not with its size.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Size of the blocks that are skipped if they are zero, in bytes.
const BLOCK_BYTES: usize = 4096;
/// Size of a read, in bytes.
const READ_BYTES: usize = 1 << 20;
const ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// Returns a hash that is long enough for a name, as hex digits.
pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    short(blake3::hash(bytes))
}

/// Returns a hash of a file's size and of its nonzero blocks with their offsets. The hash does
/// not depend on whether zeroes are stored or holes.
pub(crate) fn of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while let Some(data) = next_data(&file, at)? {
        at = data - data % BLOCK_BYTES as u64;
        seek(&file, SeekFrom::Start(at))?;
        let length = read_full(&mut file, &mut buffer)?;
        for (block, place) in buffer[..length].chunks(BLOCK_BYTES).zip((at..).step_by(BLOCK_BYTES))
        {
            if block != &ZEROES[..block.len()] {
                hasher.update(&place.to_le_bytes());
                hasher.update(block);
            }
        }
        at += length as u64;
    }
    Ok(short(hasher.finalize()))
}

/// A hash of all files below a directory, with their names.
pub(crate) fn of_tree(directory: &Path) -> io::Result<String> {
    let mut text = String::new();
    let mut entries = std::fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let hash = if entry.file_type()?.is_dir() { of_tree(&path)? } else { of_file(&path)? };
        text.push_str(&format!("{} {hash}\n", entry.file_name().to_string_lossy()));
    }
    Ok(of_bytes(text.as_bytes()))
}

/// Returns the offset of the next stored data at or after `from`, or `None` at the end.
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    loop {
        match file.read(&mut buffer[filled..])? {
            0 => return Ok(filled),
            length => filled += length,
        }
    }
}

fn short(hash: blake3::Hash) -> String {
    hash.to_hex()[..32].to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn hash_depends_on_content_and_not_on_holes() {
        let directory = tempfile::tempdir().unwrap();
        let (sparse, dense) = (directory.path().join("sparse"), directory.path().join("dense"));
        let mut content = vec![0; 5 << 20];
        for at in [0, 4095, 1 << 20, (3 << 20) + 17, (5 << 20) - 1] {
            content[at] = 7;
        }
        std::fs::write(&dense, &content).unwrap();
        let file = File::create(&sparse).unwrap();
        file.set_len(content.len() as u64).unwrap();
        for (at, byte) in content.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            file.write_all_at(&[*byte], at as u64).unwrap();
        }

        assert_eq!(of_file(&sparse).unwrap(), of_file(&dense).unwrap());

        file.write_all_at(&[8], 4095).unwrap();
        assert_ne!(of_file(&sparse).unwrap(), of_file(&dense).unwrap());
    }

    #[test]
    fn hash_depends_on_the_file_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "").unwrap();
        let empty = of_file(&path).unwrap();

        std::fs::write(&path, [0; 10_000]).unwrap();

        assert_ne!(of_file(&path).unwrap(), empty);
    }
}
