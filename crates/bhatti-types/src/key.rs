//! What an API key allows.

use std::str::FromStr;

/// What the holder of an API key may do with its owner's resources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyScope {
    /// Everything that the owner may do.
    #[default]
    Full,
    /// Only look: lists, details, files, logs and events. The holder changes nothing, runs nothing
    /// and reaches no ports. Reading a file wakes its sandbox.
    Read,
}

impl KeyScope {
    /// Returns the scope's name in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Read => "read",
        }
    }
}

/// A name that is not a scope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown scope `{0}`: expected `full` or `read`")]
pub struct UnknownKeyScope(String);

impl FromStr for KeyScope {
    type Err = UnknownKeyScope;

    fn from_str(text: &str) -> Result<Self, UnknownKeyScope> {
        match text {
            "full" => Ok(Self::Full),
            "read" => Ok(Self::Read),
            _ => Err(UnknownKeyScope(text.to_owned())),
        }
    }
}
