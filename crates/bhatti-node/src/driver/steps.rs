//! The steps of a sandbox's transitions, by name, so that a test can inject a fault at each of
//! them.

#[cfg(feature = "faults")]
mod faults;

/// A step that has just been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
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

/// Injects the fault that a test wants at this step: aborts the daemon, or returns whether the VMM
/// must die. The shipped program has no faults to inject: see the feature `faults`.
#[cfg(not(feature = "faults"))]
pub(crate) const fn reached(_: Step) -> bool {
    false
}

#[cfg(feature = "faults")]
pub(crate) use faults::reached;
