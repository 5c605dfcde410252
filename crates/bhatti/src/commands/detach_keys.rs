//! Keys that detach a terminal from its session.

use std::str::FromStr;

/// A sequence of keys, such as `ctrl-p,ctrl-q`. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DetachKeys(Vec<u8>);

impl DetachKeys {
    /// Ctrl+\.
    pub(crate) const DEFAULT: &str = r"ctrl-\";
}

impl FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(parse_key).collect::<Result<_, _>>().map(Self)
    }
}

/// Parses one key: an ASCII character, or `ctrl-` and a letter or one of `@ [ \ ] ^ _`.
fn parse_key(text: &str) -> Result<u8, String> {
    let failed = || format!("`{text}` is not a key: expected a character or ctrl-CHARACTER");
    let one = |text: &str| match text.as_bytes() {
        [key] if key.is_ascii_graphic() => Ok(*key),
        _ => Err(failed()),
    };
    match text.strip_prefix("ctrl-") {
        Some(rest) => match one(rest)?.to_ascii_uppercase() {
            key @ b'@'..=b'_' => Ok(key & 0x1f),
            _ => Err(failed()),
        },
        None => one(text),
    }
}

/// Looks for a sequence of keys in what the user types.
pub(super) struct Detector {
    keys: Vec<u8>,
    /// The number of keys of the sequence that were typed last. They are held back.
    matched: usize,
}

impl Detector {
    pub(super) fn new(keys: &DetachKeys) -> Self {
        Self { keys: keys.0.clone(), matched: 0 }
    }

    /// Takes typed keys. Returns the keys for the session, and whether the sequence is complete.
    /// Keys after the sequence are dropped.
    pub(super) fn feed(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(typed.len());
        for key in typed {
            if *key != self.keys[self.matched] {
                // Held back keys are not the beginning of the sequence after all.
                passed.extend_from_slice(&self.keys[..self.matched]);
                self.matched = 0;
            }
            if *key == self.keys[self.matched] {
                self.matched += 1;
            } else {
                passed.push(*key);
            }
            if self.matched == self.keys.len() {
                self.matched = 0;
                return (passed, true);
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> DetachKeys {
        text.parse().unwrap()
    }

    #[test]
    fn keys_are_parsed() {
        assert_eq!(keys(DetachKeys::DEFAULT), DetachKeys(vec![0x1c]));
        assert_eq!(keys("ctrl-p,ctrl-q"), DetachKeys(vec![0x10, 0x11]));
        assert_eq!(keys("~,."), DetachKeys(b"~.".to_vec()));
        for text in ["", "ctrl-", "ctrl-1", "ab", "ctrl-p,", "é"] {
            assert!(text.parse::<DetachKeys>().is_err(), "{text}");
        }
    }

    #[test]
    fn sequence_is_found_across_pieces_and_other_keys_pass() {
        let mut detector = Detector::new(&keys("ctrl-p,ctrl-q"));

        assert_eq!(detector.feed(b"ab\x10"), (b"ab".to_vec(), false));
        assert_eq!(detector.feed(b"c"), (b"\x10c".to_vec(), false));
        assert_eq!(detector.feed(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(detector.feed(b"\x11rest"), (Vec::new(), true));
    }

    #[test]
    fn default_key_detaches_at_once() {
        let mut detector = Detector::new(&keys(DetachKeys::DEFAULT));

        assert_eq!(detector.feed(b"x\x1cy"), (b"x".to_vec(), true));
    }
}
