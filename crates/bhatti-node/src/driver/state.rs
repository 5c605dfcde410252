//! The states of a sandbox, and which requests each state admits.
//!
//! ```text
//!                ┌──────────── Failed ◄──────────────┐
//!                │ cold boot      ▲                  │ the VMM ends
//!                ▼                │                  │
//!  Creating ──► Hot ◄──────────► Warm ──────────► Cold ◄──► (hot: wake)
//!                │  pause, resume │     save         │
//!                └──► Stopping ◄──┘                  │
//!                        └──────────► Stopped ◄──────┘   start: as a wake, or a cold boot
//!  any state ──► Destroying ──► Destroyed
//! ```
//!
//! [`admit`] is the table of requests. It does no I/O and is tested for every pair.

use std::sync::Arc;

use bhatti_types::{Denied, FailReason, SandboxState, Thermal};

use super::access::Running;
use crate::admission::Admitted;

/// A sandbox's state, with what exists in it.
#[derive(Clone)]
pub(crate) enum State {
    /// The VM is being made.
    Creating,
    /// The VM runs.
    Hot(Running),
    /// The VM is paused, or is closed to new leases because it is about to be.
    Warm(Running),
    /// No VM; the memory is in a snapshot in the sandbox's directory.
    Cold,
    /// No VM; the guest has rebooted, and the sandbox boots from its disk.
    Rebooting,
    /// A stop was requested; the VM is being saved.
    Stopping(Running),
    /// No VM; the memory is in a snapshot if the engine can save it.
    Stopped,
    /// The VM ended without a request. The memory is still reserved if the VMM may be alive.
    Failed(FailReason, Option<Arc<Admitted>>),
    /// The sandbox is being destroyed. The memory is reserved until nothing of the VM is left.
    Destroying(Option<Arc<Admitted>>),
    /// Nothing is left.
    Destroyed,
}

/// A [`State`] without what exists in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Creating,
    Hot,
    Warm,
    Cold,
    Rebooting,
    Stopping,
    Stopped,
    Failed(FailReason),
    Destroying,
    Destroyed,
}

impl State {
    pub(crate) const fn kind(&self) -> Kind {
        match self {
            Self::Creating => Kind::Creating,
            Self::Hot(_) => Kind::Hot,
            Self::Warm(_) => Kind::Warm,
            Self::Cold => Kind::Cold,
            Self::Rebooting => Kind::Rebooting,
            Self::Stopping(_) => Kind::Stopping,
            Self::Stopped => Kind::Stopped,
            Self::Failed(reason, _) => Kind::Failed(*reason),
            Self::Destroying(_) => Kind::Destroying,
            Self::Destroyed => Kind::Destroyed,
        }
    }

    /// Returns the VM, if there is one.
    pub(crate) const fn running(&self) -> Option<&Running> {
        match self {
            Self::Hot(running) | Self::Warm(running) | Self::Stopping(running) => Some(running),
            _ => None,
        }
    }

    /// Returns the memory that is reserved for the VM.
    pub(crate) fn memory(&self) -> Option<Arc<Admitted>> {
        match self {
            Self::Hot(running) | Self::Warm(running) | Self::Stopping(running) => {
                Some(running.admitted())
            }
            Self::Failed(_, memory) | Self::Destroying(memory) => memory.clone(),
            _ => None,
        }
    }
}

impl Kind {
    /// Returns the state as users and the store see it.
    pub(crate) const fn sandbox_state(self) -> SandboxState {
        match self {
            Self::Creating => SandboxState::Creating,
            Self::Hot | Self::Warm | Self::Cold | Self::Rebooting => SandboxState::Running,
            Self::Stopping | Self::Stopped => SandboxState::Stopped,
            Self::Failed(reason) => SandboxState::Failed(reason),
            Self::Destroying | Self::Destroyed => SandboxState::Destroyed,
        }
    }

    /// Returns the activity of a running sandbox.
    pub(crate) const fn thermal(self) -> Option<Thermal> {
        match self {
            Self::Hot => Some(Thermal::Hot),
            Self::Warm => Some(Thermal::Warm),
            Self::Cold | Self::Rebooting => Some(Thermal::Cold),
            _ => None,
        }
    }
}

/// What a driver can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The VM runs.
    Wake,
    /// The VM is paused.
    Pause,
    /// The sandbox is saved and stays stopped.
    Stop,
    /// A stopped sandbox runs, with its memory.
    Start,
    /// The sandbox runs, booted from its disk.
    ColdBoot,
    /// A setting that the driver heeds changes: whether the sandbox stays hot, or its time limit.
    Change,
    /// The sandbox is saved elsewhere and runs on.
    Save,
    /// The layers of the disk are merged.
    Merge,
    /// An unused sandbox is saved, because others need its memory.
    GiveMemory,
    /// The sandbox is saved, because the daemon stops.
    Sleep,
    /// The sandbox is destroyed.
    Destroy,
}

/// The answer to a request in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// The driver carries it out.
    Perform,
    /// Nothing is to be done.
    Already,
    /// It cannot be carried out.
    Denied(Denied),
}

/// Decides about a request. ARCHITECTURE.md shows this table.
pub(crate) const fn admit(state: Kind, wanted: Wanted) -> Admission {
    use Admission::{Already, Perform};
    use Wanted::{
        Change, ColdBoot, Destroy, GiveMemory, Merge, Pause, Save, Sleep, Start, Stop, Wake,
    };
    match (state, wanted) {
        (Kind::Destroyed, _)
        | (
            Kind::Destroying,
            Wake | Pause | Stop | Start | ColdBoot | Change | Save | Merge | GiveMemory | Sleep,
        ) => Admission::Denied(Denied::Destroyed),
        (_, Destroy) => Perform,

        (Kind::Creating, GiveMemory | Sleep) => Already,
        (Kind::Creating, Wake | Pause | Stop | Start | ColdBoot | Change | Save | Merge) => {
            Admission::Denied(Denied::StillCreating)
        }

        (Kind::Hot, Wake | GiveMemory) => Already,
        (Kind::Warm, Pause) => Already,
        (Kind::Hot | Kind::Warm, ColdBoot) => Admission::Denied(Denied::Running),
        // A failed stop may have left the row as `stopped`: the start writes it.
        (Kind::Hot, Pause | Stop | Start | Change | Save | Merge | Sleep)
        | (Kind::Warm, Wake | Stop | Start | Change | Save | Merge | GiveMemory | Sleep) => Perform,

        (Kind::Cold | Kind::Rebooting, Pause | GiveMemory | Sleep) => Already,
        (Kind::Cold | Kind::Rebooting, Wake | Stop | Start | ColdBoot | Change | Save | Merge) => {
            Perform
        }

        (Kind::Stopping | Kind::Stopped, Wake | Pause | Save | Merge) => {
            Admission::Denied(Denied::Stopped)
        }
        (Kind::Stopped, Stop | GiveMemory | Sleep) => Already,
        (Kind::Stopping, Stop | Start | ColdBoot | Change | GiveMemory | Sleep)
        | (Kind::Stopped, Start | ColdBoot | Change) => Perform,

        (Kind::Failed(_), GiveMemory | Sleep) => Already,
        (Kind::Failed(_), ColdBoot | Change) => Perform,
        (Kind::Failed(reason), Wake | Pause | Stop | Start | Save | Merge) => {
            Admission::Denied(Denied::Failed(reason))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const WANTED: [Wanted; 11] = [
        Wanted::Wake,
        Wanted::Pause,
        Wanted::Stop,
        Wanted::Start,
        Wanted::ColdBoot,
        Wanted::Change,
        Wanted::Save,
        Wanted::Merge,
        Wanted::GiveMemory,
        Wanted::Sleep,
        Wanted::Destroy,
    ];

    const FAILED: Kind = Kind::Failed(FailReason::VmmExited);

    pub(crate) const KINDS: [Kind; 10] = [
        Kind::Creating,
        Kind::Hot,
        Kind::Warm,
        Kind::Cold,
        Kind::Rebooting,
        Kind::Stopping,
        Kind::Stopped,
        FAILED,
        Kind::Destroying,
        Kind::Destroyed,
    ];

    fn name(kind: Kind) -> String {
        match kind {
            Kind::Failed(_) => "failed".to_owned(),
            kind => format!("{kind:?}").to_lowercase(),
        }
    }

    /// The table of all pairs, as ARCHITECTURE.md has it.
    fn table() -> String {
        let mut table = "| state |".to_owned();
        for wanted in WANTED {
            table += &format!(" {} |", format!("{wanted:?}").to_lowercase());
        }
        table += &format!("\n|{}\n", "---|".repeat(WANTED.len() + 1));
        for kind in KINDS {
            table += &format!("| {} |", name(kind));
            for wanted in WANTED {
                table += match admit(kind, wanted) {
                    Admission::Perform => " yes |",
                    Admission::Already => " done |",
                    Admission::Denied(_) => " – |",
                };
            }
            table += "\n";
        }
        table
    }

    #[test]
    fn architecture_page_has_the_table_of_requests() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ARCHITECTURE.md");
        let page = std::fs::read_to_string(page).unwrap();

        assert!(page.contains(&table()), "put this table into ARCHITECTURE.md:\n{}", table());
    }

    #[test]
    fn denial_names_the_state() {
        for (kind, denied) in [
            (Kind::Creating, Denied::StillCreating),
            (Kind::Stopping, Denied::Stopped),
            (Kind::Stopped, Denied::Stopped),
            (FAILED, Denied::Failed(FailReason::VmmExited)),
            (Kind::Destroying, Denied::Destroyed),
            (Kind::Destroyed, Denied::Destroyed),
        ] {
            assert_eq!(admit(kind, Wanted::Save), Admission::Denied(denied), "{kind:?}");
        }
    }

    #[test]
    fn destruction_is_denied_only_if_nothing_is_left() {
        for kind in KINDS {
            let is_denied = matches!(admit(kind, Wanted::Destroy), Admission::Denied(_));
            assert_eq!(is_denied, kind == Kind::Destroyed, "{kind:?}");
        }
    }

    #[test]
    fn request_is_done_only_where_its_goal_is_reached_or_does_not_apply() {
        for kind in KINDS {
            if admit(kind, Wanted::Wake) == Admission::Already {
                assert_eq!(kind.thermal(), Some(Thermal::Hot), "{kind:?}");
            }
            if admit(kind, Wanted::Stop) == Admission::Already {
                assert_eq!(kind.sandbox_state(), SandboxState::Stopped, "{kind:?}");
            }
            if admit(kind, Wanted::Sleep) == Admission::Already {
                assert!(!matches!(kind, Kind::Hot | Kind::Warm | Kind::Stopping), "{kind:?}");
            }
        }
    }

    #[test]
    fn sandbox_that_can_be_used_admits_every_use() {
        for kind in KINDS {
            let is_running = kind.sandbox_state().admit_use().is_ok();
            for wanted in [Wanted::Wake, Wanted::Save, Wanted::Merge] {
                let is_denied = matches!(admit(kind, wanted), Admission::Denied(_));
                assert_eq!(is_denied, !is_running, "{kind:?}, {wanted:?}");
            }
        }
    }
}
