//! Sparse files: where the stored content lies in the file.

use std::io::Read;

use super::LayerError;
use super::header::BLOCK;
use super::reader::Entries;

/// Maximum number of segments of one file.
const SEGMENTS_MAX: usize = 1 << 16;

/// Maximum length of a number in a map, in digits.
const DIGITS_MAX: usize = 20;

/// The segments of a sparse file, in order: offset and length in bytes. What lies between them is
/// zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SparseMap(Vec<(u64, u64)>);

impl SparseMap {
    /// Checks the segments: in order, apart, within `size`, and together as long as the `stored`
    /// content.
    pub(super) fn new(
        segments: Vec<(u64, u64)>,
        size: u64,
        stored: u64,
    ) -> Result<Self, LayerError> {
        check_count(segments.len())?;
        let malformed = || LayerError::Format("the map of a sparse file is malformed");
        let (mut end, mut total) = (0, 0_u64);
        for (offset, length) in &segments {
            if *offset < end {
                return Err(malformed());
            }
            end = offset.checked_add(*length).filter(|end| *end <= size).ok_or_else(malformed)?;
            total += length;
        }
        if total == stored { Ok(Self(segments)) } else { Err(malformed()) }
    }

    pub(super) fn segments(&self) -> &[(u64, u64)] {
        &self.0
    }
}

pub(super) fn check_count(segments: usize) -> Result<(), LayerError> {
    if segments > SEGMENTS_MAX {
        return Err(LayerError::Format("a sparse file has too many segments"));
    }
    Ok(())
}

/// Reads the map at the start of a content (format 1.0): decimal numbers in lines, the count
/// first, padded to a block.
pub(super) fn read_map<R: Read>(entries: &mut Entries<R>) -> Result<Vec<(u64, u64)>, LayerError> {
    let mut content = entries.content();
    let mut read = 0;
    let mut number = || -> Result<u64, LayerError> {
        let mut digits = String::new();
        loop {
            let mut byte = [0];
            content.read_exact(&mut byte).map_err(LayerError::Read)?;
            read += 1;
            match byte[0] {
                b'\n' => return digits.parse().map_err(|_| malformed()),
                digit if digit.is_ascii_digit() && digits.len() < DIGITS_MAX => {
                    digits.push(digit.into());
                }
                _ => return Err(malformed()),
            }
        }
    };
    let malformed_count = |_| malformed();
    let count = usize::try_from(number()?).map_err(malformed_count)?;
    check_count(count)?;
    let mut segments = Vec::new();
    for _ in 0..count {
        segments.push((number()?, number()?));
    }
    let mut padding = [0; BLOCK];
    let padding = &mut padding[..usize::wrapping_neg(read) % BLOCK];
    content.read_exact(padding).map_err(LayerError::Read)?;
    Ok(segments)
}

fn malformed() -> LayerError {
    LayerError::Format("the map of a sparse file is malformed")
}
