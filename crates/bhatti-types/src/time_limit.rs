//! The time limit of a sandbox.

use std::str::FromStr;

/// What happens to a sandbox when its time is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It is destroyed.
    #[default]
    Destroy,
    /// It is stopped. The limit is removed then.
    Stop,
}

impl OnTimeout {
    /// Returns the name in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Destroy => "destroy",
            Self::Stop => "stop",
        }
    }
}

/// A text that does not say what happens when the time is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown end of a time limit `{0}`: expected `destroy` or `stop`")]
pub struct UnknownOnTimeout(String);

impl FromStr for OnTimeout {
    type Err = UnknownOnTimeout;

    fn from_str(text: &str) -> Result<Self, UnknownOnTimeout> {
        match text {
            "destroy" => Ok(Self::Destroy),
            "stop" => Ok(Self::Stop),
            _ => Err(UnknownOnTimeout(text.chars().take(64).collect())),
        }
    }
}

/// The time limit of a sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeLimit {
    /// When the time is over, in seconds since 1970; never if absent.
    pub expires_at: Option<u64>,
    /// What happens then.
    pub on_timeout: OnTimeout,
}

impl TimeLimit {
    /// Returns the limit with a change.
    #[must_use]
    pub fn with(self, change: TimeLimitChange) -> Self {
        let expires_at = change.expires_at.unwrap_or(self.expires_at);
        let never = u64::MAX;
        let is_earlier = expires_at.unwrap_or(never) < self.expires_at.unwrap_or(never);
        Self {
            expires_at: if change.only_later && is_earlier { self.expires_at } else { expires_at },
            on_timeout: change.on_timeout.unwrap_or(self.on_timeout),
        }
    }
}

/// A change of a time limit. Absent fields stay unchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeLimitChange {
    /// See [`TimeLimit::expires_at`].
    pub expires_at: Option<Option<u64>>,
    /// Whether an earlier time is ignored.
    pub only_later: bool,
    /// Whether the change is refused unless the sandbox runs.
    pub only_running: bool,
    /// See [`TimeLimit::on_timeout`].
    pub on_timeout: Option<OnTimeout>,
}
