//! Ids: sixteen lower-case hexadecimal digits, so that they are valid DNS labels and file names.

use std::fmt;
use std::str::FromStr;

/// A string that is not an id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an id; an id has sixteen digits 0-9 or a-f")]
pub struct ParseIdError {
    text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 8]);

        impl $name {
            /// Makes an id from eight random bytes.
            #[must_use]
            pub const fn from_entropy(bytes: [u8; 8]) -> Self {
                Self(bytes)
            }

            /// The id as a number.
            #[must_use]
            pub const fn as_u64(self) -> u64 {
                u64::from_be_bytes(self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                read_hex(text).map(Self).ok_or_else(|| ParseIdError { text: text.to_owned() })
            }
        }
    };
}

fn read_hex(text: &str) -> Option<[u8; 8]> {
    let digits: &[u8; 16] = text.as_bytes().try_into().ok()?;
    let mut number: u64 = 0;
    for digit in digits {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        number = number << 4 | u64::from(digit);
    }
    Some(number.to_be_bytes())
}

/// Writes all sixteen digits at once, because lists have thousands of ids.
fn write_hex(bytes: [u8; 8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0; 16];
    for (digits, byte) in text.chunks_exact_mut(2).zip(bytes) {
        digits[0] = DIGITS[usize::from(byte >> 4)];
        digits[1] = DIGITS[usize::from(byte & 0xf)];
    }
    f.write_str(str::from_utf8(&text).map_err(|_| fmt::Error)?)
}

id! {
    /// The id of a sandbox, unique across machines.
    SandboxId
}

id! {
    /// The id of a volume, unique across machines.
    VolumeId
}

id! {
    /// The id of a named snapshot, unique across machines.
    SnapshotId
}

id! {
    /// The id of a template.
    TemplateId
}

id! {
    /// The id of a node: one data directory on one host, unique across machines.
    NodeId
}

id! {
    /// The id of a user.
    UserId
}

impl UserId {
    /// The owner of the daemon's Unix socket.
    pub const ADMIN: Self = Self([0; 8]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_round_trips_through_its_text() {
        let id = SandboxId::from_entropy([0, 1, 0xab, 0xff, 4, 5, 6, 7]);

        assert_eq!(id.to_string(), "0001abff04050607");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn malformed_ids_are_refused() {
        for text in [
            "",
            "dev",
            "0001ABFF04050607",
            "0001abff0405060",
            "0001abff040506070",
            "+001abff04050607",
        ] {
            assert_eq!(
                text.parse::<SandboxId>(),
                Err(ParseIdError { text: text.to_owned() }),
                "{text}"
            );
        }
    }
}
