//! Memory is set aside before a VM gets it: a host that wakes fifty sandboxes at once makes some of them wait, and kills none.

use std::sync::Arc;
use std::time::Duration;

use bhatti_types::MemoryMib;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// What a VMM needs beside its guest's memory, in MiB.
const VMM_MIB: u32 = 48;

/// How long a request may wait for memory.
const WAIT_LIMIT: Duration = Duration::from_secs(10);

/// There is no memory for another VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// Others have it.
    #[error(
        "the host's memory is in use: {wanted_mib} MiB are wanted, {free_mib} of {budget_mib} MiB are free"
    )]
    InUse {
        /// What is wanted.
        wanted_mib: u32,
        /// What is left.
        free_mib: usize,
        /// What there is for all sandboxes.
        budget_mib: usize,
    },
    /// All of it would not do.
    #[error("{wanted_mib} MiB are wanted, and all sandboxes together may have {budget_mib} MiB")]
    TooLarge {
        /// What is wanted.
        wanted_mib: u32,
        /// What there is for all sandboxes.
        budget_mib: usize,
    },
}

/// The memory of all VMs.
pub(crate) struct Admission {
    free: Arc<Semaphore>,
    budget_mib: usize,
}

/// Memory that was set aside, until it is dropped.
pub(crate) struct Admitted(
    #[expect(dead_code, reason = "held, not read")] Option<OwnedSemaphorePermit>,
);

impl Admission {
    pub(crate) fn new(budget_mib: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(budget_mib.min(Semaphore::MAX_PERMITS))), budget_mib }
    }

    /// Sets memory aside for a VM. `make_room` is called once if there is too little.
    pub(crate) async fn admit(
        &self,
        memory: MemoryMib,
        make_room: impl FnOnce(),
    ) -> Result<Admitted, Busy> {
        self.check(memory)?;
        let (wanted_mib, budget_mib) = (memory.get() + VMM_MIB, self.budget_mib);
        if let Ok(permit) = Arc::clone(&self.free).try_acquire_many_owned(wanted_mib) {
            return Ok(Admitted(Some(permit)));
        }
        make_room();
        let waiting = Arc::clone(&self.free).acquire_many_owned(wanted_mib);
        match timeout(WAIT_LIMIT, waiting).await {
            Ok(Ok(permit)) => Ok(Admitted(Some(permit))),
            Ok(Err(_)) | Err(_) => {
                let free_mib = self.free.available_permits();
                Err(Busy::InUse { wanted_mib, free_mib, budget_mib })
            }
        }
    }

    /// Refuses what will never fit.
    pub(crate) fn check(&self, memory: MemoryMib) -> Result<(), Busy> {
        let (wanted_mib, budget_mib) = (memory.get() + VMM_MIB, self.budget_mib);
        if wanted_mib as usize > budget_mib {
            return Err(Busy::TooLarge { wanted_mib, budget_mib });
        }
        Ok(())
    }

    /// What is left, and what there is for all VMs, in MiB.
    pub(crate) fn free_and_budget_mib(&self) -> (usize, usize) {
        (self.free.available_permits(), self.budget_mib)
    }

    /// Sets memory aside, if there is any right now.
    pub(crate) fn admit_now(&self, memory: MemoryMib) -> Option<Admitted> {
        let permit = Arc::clone(&self.free).try_acquire_many_owned(memory.get() + VMM_MIB);
        permit.ok().map(|permit| Admitted(Some(permit)))
    }

    /// Counts a VM that has its memory already, as far as there is any left to count.
    pub(crate) fn count(&self, memory: MemoryMib) -> Admitted {
        let free = u32::try_from(self.free.available_permits()).unwrap_or(u32::MAX);
        let counted = free.min(memory.get() + VMM_MIB);
        Admitted(Arc::clone(&self.free).try_acquire_many_owned(counted).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn memory_is_given_back_and_never_twice() {
        let admission = Admission::new(2 * (512 + VMM_MIB) as usize);
        let memory = MemoryMib::DEFAULT;
        let first = admission.admit(memory, || panic!("there is room")).await.unwrap();
        let _second = admission.admit(memory, || panic!("there is room")).await.unwrap();

        let mut asked = false;
        let third = admission.admit(memory, || asked = true).await.err();
        assert!(asked && matches!(third, Some(Busy::InUse { free_mib: 0, .. })), "{third:?}");

        admission.admit(memory, || drop(first)).await.unwrap();
        let large = admission.admit(MemoryMib::try_from(4096).unwrap(), || ()).await.err();
        assert!(matches!(large, Some(Busy::TooLarge { .. })), "{large:?}");
    }
}
