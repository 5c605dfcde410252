//! Cuts a byte stream into pieces that do not split characters.

/// Holds back the beginning of a character until its end arrives.
#[derive(Debug, Default)]
pub(crate) struct Utf8Pieces {
    held: Vec<u8>,
}

impl Utf8Pieces {
    /// Appends `bytes`, and returns all bytes held except an incomplete character at the end.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(bytes);
        let keep = incomplete_tail(&self.held);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Returns the bytes that are still held, at the end of the stream.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }
}

/// Returns the length of an incomplete character at the end of `bytes`, in bytes. Returns 0 if
/// there is none, or if the last bytes cannot become a character.
fn incomplete_tail(bytes: &[u8]) -> usize {
    // A character has at most four bytes, so its first is among the last three if it is incomplete.
    let from = bytes.len().saturating_sub(3);
    let first = bytes[from..].iter().rposition(|byte| byte & 0xc0 == 0xc0).map(|at| from + at);
    let tail = first.map_or(&[][..], |first| &bytes[first..]);
    match std::str::from_utf8(tail) {
        Err(error) if error.error_len().is_none() => tail.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn character_is_never_split() {
        let mut pieces = Utf8Pieces::default();
        let text = "aé€😀z";

        let out: Vec<String> = text
            .bytes()
            .map(|byte| String::from_utf8(pieces.push(&[byte])).expect("whole characters"))
            .collect();

        assert_eq!(out.concat(), text);
        assert_eq!(pieces.finish(), b"");
    }

    #[test]
    fn bytes_that_are_not_utf8_pass_unchanged() {
        let mut pieces = Utf8Pieces::default();
        let bytes: Vec<u8> = (0..=255).rev().collect();

        let mut out = pieces.push(&bytes);
        out.extend(pieces.push(&bytes));
        out.extend(pieces.finish());

        assert_eq!(out, [bytes.clone(), bytes].concat());
    }

    #[test]
    fn finish_returns_an_incomplete_character() {
        let mut pieces = Utf8Pieces::default();

        assert_eq!(pieces.push(&"€".as_bytes()[..2]), b"");
        assert_eq!(pieces.finish(), "€".as_bytes()[..2]);
    }
}
