//! The sandbox lifecycle.
//!
//! ```text
//!  creating ──► running ◄──► stopped ──► destroyed
//!      │         │     ▲                      ▲
//!      │         ▼     │ (a cold boot)        │
//!      │         failed ──────────────────────┤
//!      └──────────────────────────────────────┘
//! ```
//!
//! A sandbox that could not be created leaves nothing behind. One that runs is hot, warm or cold, and any request makes it hot. One that was
//! stopped stays so until it is started. One whose VM died is `failed`, with the reason, until it is booted anew or destroyed. Only the sandbox's driver task changes its state; the row in the store is written before the effect it announces.

use std::fmt;
use std::str::FromStr;

/// Where a sandbox stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SandboxState {
    /// Its VM is being made; it cannot be used yet.
    Creating,
    /// It can be used; whether its VM runs right now is a matter of [`Thermal`].
    Running,
    /// Somebody stopped it. Its memory and processes are in a snapshot.
    Stopped,
    /// Its VM is gone without having been asked to go.
    Failed(FailReason),
    /// It is being taken away; what is left of it goes with the next start of the daemon at the latest.
    Destroyed,
}

/// What a running sandbox costs right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Thermal {
    /// Its vCPUs run.
    Hot,
    /// Its vCPUs are paused, and its memory is kept.
    Warm,
    /// It has no process; its memory is in a snapshot.
    Cold,
}

impl Thermal {
    /// The word for it in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

/// Why a sandbox is [`SandboxState::Failed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailReason {
    /// The VMM process ended.
    VmmExited,
    /// The daemon started and found no VMM process of a sandbox that was running.
    VmmMissing,
    /// The daemon started and could not talk to the VMM process of a sandbox that was running.
    VmmUnusable,
}

/// Why a request to use a sandbox was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// It is not up yet.
    #[error("sandbox is still being created")]
    StillCreating,
    /// Somebody stopped it.
    #[error("sandbox is stopped")]
    Stopped,
    /// It runs, and would lose its memory.
    #[error("sandbox is running")]
    Running,
    /// Its VM died.
    #[error("sandbox has failed: {0}")]
    Failed(FailReason),
    /// It is going or gone.
    #[error("sandbox has been destroyed")]
    Destroyed,
}

impl SandboxState {
    /// Whether processes can be started in the sandbox.
    ///
    /// # Errors
    ///
    /// Says why not.
    pub const fn admit_use(self) -> Result<(), Denied> {
        match self {
            Self::Creating => Err(Denied::StillCreating),
            Self::Running => Ok(()),
            Self::Stopped => Err(Denied::Stopped),
            Self::Failed(reason) => Err(Denied::Failed(reason)),
            Self::Destroyed => Err(Denied::Destroyed),
        }
    }

    /// The word for the state in the API and the store.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Failed(_) => "failed",
            Self::Destroyed => "destroyed",
        }
    }
}

impl FailReason {
    /// The word for the reason in the store.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VmmExited => "vmm_exited",
            Self::VmmMissing => "vmm_missing",
            Self::VmmUnusable => "vmm_unusable",
        }
    }
}

impl fmt::Display for FailReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VmmExited => "its virtual machine process ended unexpectedly",
            Self::VmmMissing => "its virtual machine process was gone when the daemon started",
            Self::VmmUnusable => {
                "its virtual machine process did not answer when the daemon started"
            }
        })
    }
}

/// A word that names no [`FailReason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no reason to fail")]
pub struct UnknownReason(String);

impl FromStr for FailReason {
    type Err = UnknownReason;

    fn from_str(word: &str) -> Result<Self, UnknownReason> {
        [Self::VmmExited, Self::VmmMissing, Self::VmmUnusable]
            .into_iter()
            .find(|reason| reason.as_str() == word)
            .ok_or_else(|| UnknownReason(word.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_running_sandbox_can_be_used() {
        let failed = FailReason::VmmExited;

        assert_eq!(SandboxState::Creating.admit_use(), Err(Denied::StillCreating));
        assert_eq!(SandboxState::Running.admit_use(), Ok(()));
        assert_eq!(SandboxState::Stopped.admit_use(), Err(Denied::Stopped));
        assert_eq!(SandboxState::Failed(failed).admit_use(), Err(Denied::Failed(failed)));
        assert_eq!(SandboxState::Destroyed.admit_use(), Err(Denied::Destroyed));
    }

    #[test]
    fn reason_survives_its_word() {
        for reason in [FailReason::VmmExited, FailReason::VmmMissing, FailReason::VmmUnusable] {
            assert_eq!(reason.as_str().parse(), Ok(reason));
        }
        assert_eq!("bored".parse::<FailReason>(), Err(UnknownReason("bored".into())));
    }
}
