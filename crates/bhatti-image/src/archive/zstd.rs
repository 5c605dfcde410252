//! Files of several zstd frames, as pzstd and zstd:chunked write them.
//!
//! Source: RFC 8878, section 3.1: frames are decoded one after the other; a skippable frame has
//! one of sixteen magic numbers, a length, and content for other programs.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

const SKIPPABLE: std::ops::RangeInclusive<u32> = 0x184d_2a50..=0x184d_2a5f;

/// Decodes one frame after another.
pub(super) enum ZstdFrames<R: Read> {
    /// Positioned before the next frame, or at the end.
    Between(R),
    /// Inside a frame.
    Inside(Box<StreamingDecoder<R, FrameDecoder>>),
    Failed,
}

impl<R: BufRead> ZstdFrames<R> {
    /// Enters the next frame. Returns `false` at the end of the file.
    fn enter(&mut self) -> io::Result<bool> {
        let Self::Between(mut reader) = std::mem::replace(self, Self::Failed) else {
            return Ok(false);
        };
        loop {
            if reader.fill_buf()?.is_empty() {
                *self = Self::Between(reader);
                return Ok(false);
            }
            // A buffer may hold less than the magic number. Only a skippable frame is handled
            // here; the decoder checks everything else.
            let magic =
                reader.fill_buf()?.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
            if !magic.is_some_and(|magic| SKIPPABLE.contains(&magic)) {
                break;
            }
            let mut head = [0; 8];
            reader.read_exact(&mut head)?;
            let [_, _, _, _, a, b, c, d] = head;
            let length = u64::from(u32::from_le_bytes([a, b, c, d]));
            io::copy(&mut reader.by_ref().take(length), &mut io::sink())?;
        }
        let decoder = StreamingDecoder::new(reader).map_err(io::Error::other)?;
        *self = Self::Inside(Box::new(decoder));
        Ok(true)
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Self::Inside(decoder) = self {
                let read = decoder.read(buffer)?;
                if read > 0 || buffer.is_empty() {
                    return Ok(read);
                }
            }
            *self = match std::mem::replace(self, Self::Failed) {
                Self::Inside(decoder) => Self::Between(decoder.into_inner()),
                other => other,
            };
            if !self.enter()? {
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    #[test]
    fn frames_are_decoded_one_after_the_other() {
        let mut file = compress_to_vec(&b"one "[..], CompressionLevel::Fastest);
        file.extend(0x184d_2a50_u32.to_le_bytes());
        file.extend(3_u32.to_le_bytes());
        file.extend(b"xyz");
        file.extend(compress_to_vec(&b"two"[..], CompressionLevel::Fastest));
        let mut text = String::new();
        ZstdFrames::Between(&file[..]).read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two");

        let cut = &file[..file.len() - 2];
        assert!(ZstdFrames::Between(cut).read_to_end(&mut Vec::new()).is_err());
    }
}
