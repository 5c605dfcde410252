//! Names that people give: at most 63 characters, safe in a URL path, a file name and a shell.

use std::fmt;
use std::str::FromStr;

/// The longest name, in bytes (all of them ASCII).
const NAME_BYTES_MAX: usize = 63;

/// A string that cannot be a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {kind} name `{text}`: must match [a-zA-Z0-9][a-zA-Z0-9._-]{{0,62}}")]
pub struct ParseNameError {
    kind: &'static str,
    text: String,
}

fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= NAME_BYTES_MAX
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseNameError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if is_name(text) {
                    Ok(Self(text.into()))
                } else {
                    // A name of megabytes is not worth repeating in its own error.
                    let text = text.chars().take(NAME_BYTES_MAX + 1).collect();
                    Err(ParseNameError { kind: $kind, text })
                }
            }
        }
    };
}

name! {
    /// The name of a sandbox, unique among its owner's.
    SandboxName, "sandbox"
}

name! {
    /// The name of a snapshot, unique among its owner's.
    SnapshotName, "snapshot"
}

name! {
    /// The name of a user, unique on this daemon.
    UserName, "user"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_names_are_names() {
        let longest = "x".repeat(63);

        for text in ["a", "my-sandbox", "dev.v2", "test_env", "0", &longest] {
            assert_eq!(text.parse::<SandboxName>().map(|n| n.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let too_long = "x".repeat(64);

        for text in ["", "my sandbox", "a\nb", "a/b", "-a", ".a", "..", "é", "a%2f", &too_long] {
            assert!(text.parse::<SandboxName>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn error_names_the_rule() {
        let error = "a/b".parse::<SandboxName>().unwrap_err();

        let rule = "invalid sandbox name `a/b`: must match [a-zA-Z0-9][a-zA-Z0-9._-]{0,62}";
        assert_eq!(error.to_string(), rule);
    }
}
