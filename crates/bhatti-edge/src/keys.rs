//! API keys: `bht_` and 64 hex digits. Only their SHA-256 is kept.

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};

/// Prefix of every API key.
pub const PREFIX: &str = "bht_";

/// Number of hex digits of a key.
const DIGITS: usize = 64;

/// Whether a text has the form of a key.
pub(crate) fn is_formed(text: &str) -> bool {
    text.strip_prefix(PREFIX).is_some_and(|digits| {
        digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
    })
}

/// Generates an API key.
///
/// # Errors
///
/// Returns an error if the host provides no random bytes: a key that can be guessed is never
/// generated.
pub fn generate() -> Result<String, getrandom::Error> {
    Ok(PREFIX.to_owned() + &random_hex()?)
}

/// Returns 64 hex digits that cannot be guessed.
///
/// # Errors
///
/// Returns an error if the host provides no random bytes.
pub fn random_hex() -> Result<String, getrandom::Error> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret)?;
    Ok(hex::encode(secret))
}

/// Returns the hash that the store keeps of a key.
#[must_use]
pub fn hash(key: &str) -> [u8; 32] {
    let mut hash = [0; SHA256_OUTPUT_LEN];
    hash.copy_from_slice(digest(&SHA256, key.as_bytes()).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_prefix_and_hex_digits_and_differ() {
        let (first, second) = (generate().unwrap(), generate().unwrap());

        assert_eq!(first.len(), 68);
        assert!(first.starts_with("bht_") && is_formed(&first) && !is_formed(&first[1..]));
        assert_ne!(first, second);
    }

    #[test]
    fn hash_is_sha_256() {
        assert_eq!(hash("test")[..4], [0x9f, 0x86, 0xd0, 0x81]);
    }
}
