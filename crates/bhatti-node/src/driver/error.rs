//! Errors of a sandbox's transitions.

use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::CallError;
use bhatti_engine::{BootError, RemoveError, RestoreError, SnapshotError, VmmError};
use bhatti_store::StoreError;
use bhatti_types::Denied;

use crate::admission::Busy;
use crate::networks::NetworkError;
use crate::volumes::VolumeUseError;

/// A transition failed. The sandbox is in the state that it was in before.
#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    /// The sandbox's state does not allow it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// No memory is free.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The VMM failed.
    #[error("the sandbox's virtual machine failed")]
    Vmm(#[from] VmmError),
    /// The engine cannot save memory.
    #[error(
        "engine `{engine}` cannot save the memory of a sandbox, so it supports neither snapshots nor forks"
    )]
    NoSnapshots {
        /// The engine's name.
        engine: &'static str,
    },
    /// The sandbox could not be saved.
    #[error("failed to save the sandbox")]
    Save(#[from] SnapshotError),
    /// The sandbox could not be woken.
    #[error("failed to wake the sandbox")]
    Restore(#[source] Arc<RestoreError>),
    /// Several wakes in a row failed, so this one was not tried.
    #[error("failed to wake the sandbox {times} times in a row")]
    GivenUp {
        /// The number of failures.
        times: u32,
        /// The time until the next try.
        wait: Duration,
        /// The last error.
        #[source]
        error: Arc<RestoreError>,
    },
    /// The VM did not boot.
    #[error("failed to boot the sandbox")]
    Boot(#[from] BootError),
    /// The files to boot are missing.
    #[error(transparent)]
    Images(#[from] bhatti_image::StoreError),
    /// The guest did not accept its configuration.
    #[error("failed to configure the sandbox's guest")]
    Unconfigured(#[source] CallError),
    /// The network could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A volume cannot be used.
    #[error(transparent)]
    Volume(#[from] VolumeUseError),
    /// The VMM does not end.
    #[error("failed to end the sandbox's virtual machine")]
    End(#[source] RemoveError),
    /// The snapshot could not be marked as used.
    #[error("failed to mark the sandbox's snapshot as used")]
    Consume(#[source] std::io::Error),
    /// The mark of the boot could not be written.
    #[error("failed to write the boot mark in the sandbox's directory")]
    MarkBoot(#[source] std::io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host gives no random bytes.
    #[error("failed to draw random bytes")]
    Entropy(#[from] getrandom::Error),
    /// The guest's processes did not freeze, so a fork could not assume an identity before they
    /// run.
    #[error("the sandbox's processes did not freeze")]
    Moving,
    /// The sandbox's driver panicked: a defect of the daemon.
    #[error("the daemon failed while it changed the sandbox's state")]
    Panicked,
    /// The sandbox went to sleep again before each attempt to use it.
    #[error("the sandbox falls asleep before it can be used")]
    Restless,
}

impl From<RestoreError> for TransitionError {
    fn from(error: RestoreError) -> Self {
        Self::Restore(Arc::new(error))
    }
}

/// A sandbox is not completely destroyed. The daemon tries again until nothing is left.
#[derive(Debug, thiserror::Error)]
pub enum DestroyError {
    /// Parts of the VM are left.
    #[error("failed to remove the sandbox's virtual machine")]
    Remove(#[source] RemoveError),
    /// The row could not be changed.
    #[error("failed to update the sandbox's row")]
    Store(#[source] StoreError),
    /// Another request destroyed the sandbox.
    #[error("sandbox has been destroyed")]
    AlreadyGone,
}
