//! The fields of a tar header.
//!
//! Source: POSIX.1-2017, `pax`, "ustar Interchange Format"; the GNU tar manual, "Basic Tar Format".

use std::ops::Range;

use super::LayerError;

/// Size of a header, and of the blocks that content is padded to, in bytes.
pub(super) const BLOCK: usize = 512;

const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const USER: Range<usize> = 108..116;
const GROUP: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const TIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const KIND: usize = 156;
const LINK: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..263;
const PREFIX: Range<usize> = 345..500;
/// Pairs of an offset and a length, of a sparse file in GNU's old format.
const SEGMENTS: Range<usize> = 386..482;
const HAS_MORE: usize = 482;
const REAL_SIZE: Range<usize> = 483..495;
/// A block that continues the pairs.
const MORE_SEGMENTS: Range<usize> = 0..504;
const HAS_STILL_MORE: usize = 504;
const NUMBER: usize = 12;

/// One block of an archive that begins an entry.
pub(super) struct Header(pub(super) [u8; BLOCK]);

impl Header {
    pub(super) fn is_zero(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    /// Compares the checksum. Old programs summed signed bytes.
    pub(super) fn is_intact(&self) -> bool {
        let bytes = self.0.iter().enumerate();
        let bytes = bytes.map(|(at, byte)| if CHECKSUM.contains(&at) { b' ' } else { *byte });
        let unsigned: i64 = bytes.clone().map(i64::from).sum();
        let signed: i64 = bytes.map(|byte| i64::from(byte.cast_signed())).sum();
        number(&self.0[CHECKSUM]).is_ok_and(|sum| sum == unsigned || sum == signed)
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[KIND]
    }

    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(&self.0[NAME]);
        let prefix = text(&self.0[PREFIX]);
        // GNU's own format has other fields there.
        if &self.0[MAGIC] != b"ustar\0" || prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[LINK]).to_vec()
    }

    pub(super) fn mode(&self) -> Result<i64, LayerError> {
        number(&self.0[MODE])
    }

    pub(super) fn user(&self) -> Result<i64, LayerError> {
        number(&self.0[USER])
    }

    pub(super) fn group(&self) -> Result<i64, LayerError> {
        number(&self.0[GROUP])
    }

    pub(super) fn size(&self) -> Result<u64, LayerError> {
        unsigned(&self.0[SIZE])
    }

    pub(super) fn time(&self) -> Result<i64, LayerError> {
        number(&self.0[TIME])
    }

    /// The size of a sparse file in GNU's old format, with its holes.
    pub(super) fn real_size(&self) -> Result<u64, LayerError> {
        unsigned(&self.0[REAL_SIZE])
    }

    /// The first segments of such a file, and whether a block with more segments follows.
    pub(super) fn segments(&self) -> Result<(Vec<(u64, u64)>, bool), LayerError> {
        Ok((pairs(&self.0[SEGMENTS])?, self.0[HAS_MORE] != 0))
    }
}

/// The segments in a block that follows the header of a sparse file, and whether one more follows.
pub(super) fn more_segments(block: &[u8; BLOCK]) -> Result<(Vec<(u64, u64)>, bool), LayerError> {
    Ok((pairs(&block[MORE_SEGMENTS])?, block[HAS_STILL_MORE] != 0))
}

fn pairs(fields: &[u8]) -> Result<Vec<(u64, u64)>, LayerError> {
    let used = fields.chunks_exact(2 * NUMBER).take_while(|pair| pair[0] != 0);
    used.map(|pair| Ok((unsigned(&pair[..NUMBER])?, unsigned(&pair[NUMBER..])?))).collect()
}

/// The bytes of a field up to its first zero byte.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Parses a number: octal digits, or a binary number with the highest bit set (GNU's and star's
/// extension). An empty field is 0.
fn number(field: &[u8]) -> Result<i64, LayerError> {
    let malformed = || LayerError::Format("a header has a field that is not a number");
    let first = field[0];
    if first & 0x80 != 0 {
        // A two's complement number, whose second highest bit is its sign.
        let start = if first & 0x40 == 0 { i128::from(first & 0x3f) } else { -1 };
        let value = field[1..].iter().fold(start, |value, byte| value << 8 | i128::from(*byte));
        return i64::try_from(value).map_err(|_| malformed());
    }
    let digits = text(field).trim_ascii();
    if digits.is_empty() {
        return Ok(0);
    }
    let digits = std::str::from_utf8(digits).map_err(|_| malformed())?;
    i64::from_str_radix(digits, 8).map_err(|_| malformed())
}

fn unsigned(field: &[u8]) -> Result<u64, LayerError> {
    let negative = |_| LayerError::Format("a header has a negative size");
    number(field).and_then(|value| u64::try_from(value).map_err(negative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        let of = |field: &[u8]| number(field).unwrap();
        assert_eq!(of(b"0000644\0"), 0o644);
        assert_eq!(of(b"   644 \0"), 0o644);
        assert_eq!(of(b"\0\0\0\0\0\0\0\0"), 0);
        assert_eq!(of(b"\x80\0\0\0\xee\x6b\x28\0"), 4_000_000_000);
        assert_eq!(of(&[0xff; 12]), -1);
        for malformed in [&b"0000648\0"[..], b"+0000644", &[0xbf; 12]] {
            assert!(number(malformed).is_err() || malformed[0] == b'+', "{malformed:?}");
        }
        assert!(unsigned(&[0xff; 12]).is_err());
    }
}
