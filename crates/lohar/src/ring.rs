//! The scrollback of a terminal: the last 64 KiB of its output.

/// Bytes that a ring holds.
pub const RING_BYTES: usize = 64 * 1024;

/// Keeps the last [`RING_BYTES`] of a stream, addressed by their offset in the stream.
///
/// The first byte that was ever written has offset 0, whether the ring still holds it or not.
#[derive(Debug)]
pub struct Ring {
    buffer: Box<[u8]>,
    end: u64,
}

impl Default for Ring {
    fn default() -> Self {
        Self { buffer: vec![0; RING_BYTES].into_boxed_slice(), end: 0 }
    }
}

impl Ring {
    /// The offset of the oldest byte that is kept.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.end.saturating_sub(RING_BYTES as u64)
    }

    /// The offset after the newest byte.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Appends bytes, pushing the oldest out.
    pub fn write(&mut self, bytes: &[u8]) {
        // If the bytes exceed the ring, only their end is kept.
        let kept = &bytes[bytes.len().saturating_sub(RING_BYTES)..];
        let at = index(self.end + (bytes.len() - kept.len()) as u64);
        let (to_the_edge, wrapped) = kept.split_at(kept.len().min(RING_BYTES - at));
        self.buffer[at..at + to_the_edge.len()].copy_from_slice(to_the_edge);
        self.buffer[..wrapped.len()].copy_from_slice(wrapped);
        self.end += bytes.len() as u64;
    }

    /// Returns the bytes from offset `from` on, oldest first, as the two slices in which they are
    /// stored. Leaves out bytes that are no longer kept or not yet written.
    #[must_use]
    pub fn read(&self, from: u64) -> (&[u8], &[u8]) {
        let from = from.clamp(self.start(), self.end);
        let length = usize::try_from(self.end - from).unwrap_or(RING_BYTES);
        let at = index(from);
        let to_the_edge = length.min(RING_BYTES - at);
        (&self.buffer[at..at + to_the_edge], &self.buffer[..length - to_the_edge])
    }

    /// Returns all bytes that are kept, oldest first.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let (first, second) = self.read(0);
        [first, second].concat()
    }
}

/// Returns the position in the buffer of the byte at an offset.
const fn index(place: u64) -> usize {
    // A remainder by the size of a buffer fits a `usize`.
    #[expect(clippy::cast_possible_truncation, reason = "the remainder is below 2^16")]
    let index = (place % RING_BYTES as u64) as usize;
    index
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn part_of_a_ring_is_read_as_written() {
        let mut ring = Ring::default();
        ring.write(b"hello ");
        ring.write(b"world");

        assert_eq!(ring.to_vec(), b"hello world");
        assert_eq!(ring.read(6), (&b"world"[..], &b""[..]));
        assert_eq!(ring.read(99), (&b""[..], &b""[..]));
    }

    #[test]
    fn exactly_full_ring_holds_everything() {
        let mut ring = Ring::default();
        let bytes: Vec<u8> = (0..=255).cycle().take(RING_BYTES).collect();
        ring.write(&bytes);

        assert_eq!((ring.start(), ring.end()), (0, RING_BYTES as u64));
        assert_eq!(ring.to_vec(), bytes);

        ring.write(b"x");
        assert_eq!(ring.start(), 1);
        assert_eq!(ring.to_vec(), [&bytes[1..], b"x"].concat());
    }

    proptest! {
        #[test]
        fn ring_holds_the_last_bytes_written(
            writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40_000), 0..12),
            from in 0u64..300_000,
        ) {
            let mut ring = Ring::default();
            for bytes in &writes {
                ring.write(bytes);
            }
            let all = writes.concat();
            prop_assert_eq!(ring.end(), all.len() as u64);
            let start = all.len().saturating_sub(RING_BYTES);
            prop_assert_eq!(ring.to_vec(), &all[start..]);
            let (first, second) = ring.read(from);
            let from = usize::try_from(from).unwrap().clamp(start, all.len());
            prop_assert_eq!([first, second].concat(), &all[from..]);
        }
    }
}
