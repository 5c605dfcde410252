//! The steps of a sandbox's transitions, by name, so that a test can inject a fault at each of
//! them.

use std::str::FromStr;

/// A step that has just been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Paused, nothing saved.
    Paused,
    /// Resumed, the guest not notified.
    Resumed,
    /// A stop is in the row, nothing else done.
    StopNoted,
    /// Saved, the VMM alive.
    Saved,
    /// Saved, and the VMM ended.
    Ended,
    /// A start is in the row, nothing else done.
    StartNoted,
    /// A VMM waits for the snapshot.
    Staged,
    /// A snapshot is loaded, and still valid.
    Loaded,
    /// A snapshot is loaded and consumed, the VM still paused.
    Consumed,
    /// A VM that was restored runs, the guest not notified.
    Woken,
    /// The layers of a disk are merged, its sandbox runs.
    Merged,
    /// A fork's snapshot is captured, the parent still paused.
    Captured,
    /// A fork's snapshot is in place, no fork made.
    Frozen,
    /// A snapshot with a name is saved, and in no row yet.
    Unnamed,
    /// A new sandbox is in its row, nothing else done.
    Inserted,
    /// A VM that was booted or forked runs, and its guest has no identity yet.
    Running,
    /// A destruction is in the row, nothing else done.
    DestroyNoted,
    /// A sandbox's files are gone, its row is not.
    Removed,
}

impl Step {
    /// All steps.
    pub const ALL: [Self; 18] = [
        Self::Paused,
        Self::Resumed,
        Self::StopNoted,
        Self::Saved,
        Self::Ended,
        Self::StartNoted,
        Self::Staged,
        Self::Loaded,
        Self::Consumed,
        Self::Woken,
        Self::Merged,
        Self::Captured,
        Self::Frozen,
        Self::Unnamed,
        Self::Inserted,
        Self::Running,
        Self::DestroyNoted,
        Self::Removed,
    ];

    /// Returns the step's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::StopNoted => "stop_noted",
            Self::Saved => "saved",
            Self::Ended => "ended",
            Self::StartNoted => "start_noted",
            Self::Staged => "staged",
            Self::Loaded => "loaded",
            Self::Consumed => "consumed",
            Self::Woken => "woken",
            Self::Merged => "merged",
            Self::Captured => "captured",
            Self::Frozen => "frozen",
            Self::Unnamed => "unnamed",
            Self::Inserted => "inserted",
            Self::Running => "running",
            Self::DestroyNoted => "destroy_noted",
            Self::Removed => "removed",
        }
    }
}

/// No step has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown step `{0}`")]
pub struct UnknownStep(String);

impl FromStr for Step {
    type Err = UnknownStep;

    fn from_str(name: &str) -> Result<Self, UnknownStep> {
        Self::ALL
            .into_iter()
            .find(|step| step.as_str() == name)
            .ok_or_else(|| UnknownStep(name.to_owned()))
    }
}

/// A fault that a test injects at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The daemon dies, as by `kill -9`.
    Daemon(Step),
    /// The sandbox's VMM dies.
    Vmm(Step),
}

impl FromStr for Fault {
    type Err = UnknownStep;

    fn from_str(text: &str) -> Result<Self, UnknownStep> {
        match text.split_once(':') {
            Some(("daemon", step)) => step.parse().map(Self::Daemon),
            Some(("vmm", step)) => step.parse().map(Self::Vmm),
            _ => Err(UnknownStep(text.to_owned())),
        }
    }
}

/// Injects the fault if it belongs to this step: aborts the daemon, or returns whether the VMM
/// must die.
pub(crate) fn reached(step: Step, fault: Option<Fault>) -> bool {
    if fault == Some(Fault::Daemon(step)) {
        tracing::warn!(step = step.as_str(), "Aborting at this step, for a test");
        std::process::abort();
    }
    fault == Some(Fault::Vmm(step))
}
