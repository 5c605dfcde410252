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
//! A sandbox that could not be created leaves nothing behind. A running sandbox is hot, warm or
//! cold, and any request makes it hot. A stopped sandbox stays stopped until it is started. A
//! sandbox whose VM died is `failed`, with the reason, until it is booted again or destroyed.
//! Only the sandbox's driver task changes its state; the row in the store is written before the
//! effect that it announces.

use std::fmt;
use std::str::FromStr;

/// The state of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SandboxState {
    /// The VM is being made, so the sandbox cannot be used yet.
    Creating,
    /// The sandbox can be used. [`Thermal`] says whether its VM runs right now.
    Running,
    /// The sandbox was stopped on request. If the engine can save memory, its memory and
    /// processes are in a snapshot.
    Stopped,
    /// The VM ended without a request, or cannot be used.
    Failed(FailReason),
    /// The sandbox is being removed. The next start of the daemon, at the latest, removes its
    /// remains.
    Destroyed,
}

/// The activity of a running sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Thermal {
    /// The vCPUs run.
    Hot,
    /// The vCPUs are paused, and the memory is kept.
    Warm,
    /// The sandbox has no process; its memory is in a snapshot.
    Cold,
}

impl Thermal {
    /// Returns the word for the activity in the API.
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
    /// The daemon's task for the sandbox panicked: a defect of the daemon.
    DriverPanicked,
}

/// Why a request to use a sandbox was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The sandbox is not up yet.
    #[error("sandbox is still being created")]
    StillCreating,
    /// The sandbox is stopped.
    #[error("sandbox is stopped")]
    Stopped,
    /// The sandbox runs, and the request would lose its memory.
    #[error("sandbox is running")]
    Running,
    /// The sandbox's VM died.
    #[error("sandbox has failed: {0}")]
    Failed(FailReason),
    /// The sandbox is being destroyed, or is gone.
    #[error("sandbox has been destroyed")]
    Destroyed,
}

impl SandboxState {
    /// Checks whether processes can be started in the sandbox.
    ///
    /// # Errors
    ///
    /// Returns the reason why not.
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
            Self::DriverPanicked => "driver_panicked",
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
            Self::DriverPanicked => {
                "the daemon failed while it changed the sandbox's state; its log has the cause"
            }
        })
    }
}

/// A word that names no [`FailReason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown failure reason `{0}`")]
pub struct UnknownReason(String);

impl FromStr for FailReason {
    type Err = UnknownReason;

    fn from_str(word: &str) -> Result<Self, UnknownReason> {
        [Self::VmmExited, Self::VmmMissing, Self::VmmUnusable, Self::DriverPanicked]
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
    fn fail_reason_round_trips_through_its_word() {
        for reason in [FailReason::VmmExited, FailReason::VmmMissing, FailReason::VmmUnusable] {
            assert_eq!(reason.as_str().parse(), Ok(reason));
        }
        assert_eq!("bored".parse::<FailReason>(), Err(UnknownReason("bored".into())));
    }
}
