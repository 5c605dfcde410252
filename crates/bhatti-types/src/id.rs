//! Ids: sixteen lower-case hexadecimal digits, so that they can be DNS labels and file names.

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
            /// Makes an id of eight random bytes.
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
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
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
                let refused = || ParseIdError { text: text.to_owned() };
                let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
                if text.len() != 16 || !text.bytes().all(lower_hex) {
                    return Err(refused());
                }
                u64::from_str_radix(text, 16).map(|n| Self(n.to_be_bytes())).map_err(|_| refused())
            }
        }
    };
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
    fn id_survives_its_text() {
        let id = SandboxId::from_entropy([0, 1, 0xab, 0xff, 4, 5, 6, 7]);

        assert_eq!(id.to_string(), "0001abff04050607");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn text_of_another_shape_is_no_id() {
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
