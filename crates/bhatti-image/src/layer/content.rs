//! Writes the content of files, with holes where it is zero.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::LayerError;
use super::sparse::SparseMap;

/// Size of the buffer, in bytes.
const BUFFER: usize = 128 << 10;
/// Size of the smallest hole, in bytes: a block of the file systems.
const BLOCK: usize = 4096;

/// Writes the content of a file of `size` bytes with holes. `map` says where the content of a
/// sparse file lies.
pub(super) fn write(
    file: &File,
    content: &mut impl Read,
    size: u64,
    map: Option<&SparseMap>,
) -> Result<(), LayerError> {
    match map {
        None => write_at(file, content, 0, size)?,
        Some(map) => {
            for (offset, length) in map.segments() {
                write_at(file, content, *offset, *length)?;
            }
        }
    }
    file.set_len(size).map_err(LayerError::Host)
}

fn write_at(
    file: &File,
    content: &mut impl Read,
    offset: u64,
    length: u64,
) -> Result<(), LayerError> {
    let mut buffer = vec![0; BUFFER.min(usize::try_from(length).unwrap_or(BUFFER))];
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(BUFFER).min(buffer.len());
        let piece = &mut buffer[..wanted];
        content.read_exact(piece).map_err(LayerError::Read)?;
        write_data(file, piece, at).map_err(LayerError::Host)?;
        at += wanted as u64;
    }
    Ok(())
}

/// Writes the runs of blocks that are not zero.
fn write_data(file: &File, piece: &[u8], at: u64) -> io::Result<()> {
    let is_hole = |block: &&[u8]| block.iter().all(|byte| *byte == 0);
    let mut done = 0;
    while done < piece.len() {
        let rest = piece[done..].chunks(BLOCK);
        let hole: usize = rest.take_while(is_hole).map(<[u8]>::len).sum();
        done += hole;
        let rest = piece[done..].chunks(BLOCK);
        let data: usize = rest.take_while(|block| !is_hole(block)).map(<[u8]>::len).sum();
        file.write_all_at(&piece[done..done + data], at + done as u64)?;
        done += data;
    }
    Ok(())
}
