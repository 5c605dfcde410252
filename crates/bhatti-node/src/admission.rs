//! Memory is set aside before a VM gets it: a host that wakes fifty sandboxes at once makes some of them wait, and kills none.

use std::sync::Arc;
use std::time::Duration;

use bhatti_types::MemoryMib;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

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
    /// What a VMM takes beside its guest's memory, in MiB.
    vmm_mib: u32,
    /// Some was given back.
    freed: Arc<Notify>,
}

/// Memory that was set aside, until it is dropped.
pub(crate) struct Admitted {
    permit: Option<OwnedSemaphorePermit>,
    freed: Arc<Notify>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        drop(self.permit.take());
        self.freed.notify_waiters();
    }
}

impl Admission {
    pub(crate) fn new(budget_mib: usize, vmm_mib: u32) -> Self {
        let free = Arc::new(Semaphore::new(budget_mib.min(Semaphore::MAX_PERMITS)));
        Self { free, budget_mib, vmm_mib, freed: Arc::default() }
    }

    /// Sets memory aside for a VM. While there is too little, `make_room` is asked for some; it returns false if it has none to give, and
    /// then memory is waited for that others give back.
    pub(crate) async fn admit<R: Future<Output = bool>>(
        &self,
        memory: MemoryMib,
        mut make_room: impl FnMut() -> R,
    ) -> Result<Admitted, Busy> {
        self.check(memory)?;
        let admitted = async {
            loop {
                let mut freed = std::pin::pin!(self.freed.notified());
                // From here on nothing that is given back is missed.
                freed.as_mut().enable();
                if let Some(admitted) = self.admit_now(memory) {
                    return admitted;
                }
                if !make_room().await {
                    freed.await;
                }
            }
        };
        timeout(WAIT_LIMIT, admitted).await.map_err(|_| Busy::InUse {
            wanted_mib: self.wanted_mib(memory),
            free_mib: self.free.available_permits(),
            budget_mib: self.budget_mib,
        })
    }

    /// What a VM takes, in MiB.
    const fn wanted_mib(&self, memory: MemoryMib) -> u32 {
        memory.get() + self.vmm_mib
    }

    /// Refuses what will never fit.
    pub(crate) fn check(&self, memory: MemoryMib) -> Result<(), Busy> {
        let (wanted_mib, budget_mib) = (self.wanted_mib(memory), self.budget_mib);
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
        let permit = Arc::clone(&self.free).try_acquire_many_owned(self.wanted_mib(memory));
        permit.ok().map(|permit| self.admitted(Some(permit)))
    }

    /// Counts a VM that has its memory already, as far as there is any left to count.
    pub(crate) fn count(&self, memory: MemoryMib) -> Admitted {
        let free = u32::try_from(self.free.available_permits()).unwrap_or(u32::MAX);
        let counted = free.min(self.wanted_mib(memory));
        self.admitted(Arc::clone(&self.free).try_acquire_many_owned(counted).ok())
    }

    fn admitted(&self, permit: Option<OwnedSemaphorePermit>) -> Admitted {
        Admitted { permit, freed: Arc::clone(&self.freed) }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Ready, ready};

    use super::*;

    const VMM_MIB: u32 = 48;

    fn full() -> Ready<bool> {
        panic!("there is room");
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_given_back_and_never_twice() {
        let admission = Admission::new(2 * (512 + VMM_MIB) as usize, VMM_MIB);
        let memory = MemoryMib::DEFAULT;
        let first = admission.admit(memory, full).await.unwrap();
        let _second = admission.admit(memory, full).await.unwrap();

        let mut asked = 0;
        let none = || {
            asked += 1;
            ready(false)
        };
        let third = admission.admit(memory, none).await.err();
        assert!(matches!(third, Some(Busy::InUse { free_mib: 0, .. })), "{third:?}");
        assert_eq!(asked, 1);

        let mut first = Some(first);
        admission.admit(memory, || ready(first.take().is_some())).await.unwrap();
        let large =
            admission.admit(MemoryMib::try_from(4096).unwrap(), || ready(false)).await.err();
        assert!(matches!(large, Some(Busy::TooLarge { .. })), "{large:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn memory_that_others_give_back_is_taken() {
        let admission = Arc::new(Admission::new((512 + VMM_MIB) as usize, VMM_MIB));
        let memory = MemoryMib::DEFAULT;
        let held = admission.admit_now(memory).unwrap();
        tokio::spawn(async move {
            tokio::time::sleep(WAIT_LIMIT / 2).await;
            drop(held);
        });

        admission.admit(memory, || ready(false)).await.unwrap();
    }
}
