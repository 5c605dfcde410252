//! Admission control for memory: memory is reserved before a VM gets it. If a host wakes fifty
//! sandboxes at once, some of them wait and none is killed.

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
    /// Other VMs hold the memory.
    #[error("not enough free memory: {wanted_mib} MiB needed, {free_mib} of {budget_mib} MiB free")]
    InUse {
        /// The memory that the VM needs, with its VMM, in MiB.
        wanted_mib: u32,
        /// The free memory, in MiB.
        free_mib: usize,
        /// The memory budget of all VMs, in MiB.
        budget_mib: usize,
    },
    /// The VM needs more than the whole budget.
    #[error("the VM needs {wanted_mib} MiB, but the memory budget of all VMs is {budget_mib} MiB")]
    TooLarge {
        /// The memory that the VM needs, with its VMM, in MiB.
        wanted_mib: u32,
        /// The memory budget of all VMs, in MiB.
        budget_mib: usize,
    },
}

/// The memory budget of all VMs.
pub(crate) struct Admission {
    free: Arc<Semaphore>,
    budget_mib: usize,
    /// The memory that a VMM needs besides its guest's memory, in MiB.
    vmm_mib: u32,
    /// Notifies waiters when memory is freed.
    freed: Arc<Notify>,
}

/// A reservation of memory. Dropping it frees the memory.
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

    /// Reserves memory for a VM. While too little is free, calls `make_room`. If `make_room`
    /// returns false, it had nothing to free, and this waits until another VM frees memory.
    pub(crate) async fn admit<R: Future<Output = bool>>(
        &self,
        memory: MemoryMib,
        mut make_room: impl FnMut() -> R,
    ) -> Result<Admitted, Busy> {
        self.check(memory)?;
        let admitted = async {
            loop {
                let mut freed = std::pin::pin!(self.freed.notified());
                // From here on, no notification is missed.
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

    /// Returns the memory that a VM needs, with its VMM, in MiB.
    const fn wanted_mib(&self, memory: MemoryMib) -> u32 {
        memory.get() + self.vmm_mib
    }

    /// Refuses a VM that never fits the budget.
    pub(crate) fn check(&self, memory: MemoryMib) -> Result<(), Busy> {
        let (wanted_mib, budget_mib) = (self.wanted_mib(memory), self.budget_mib);
        if wanted_mib as usize > budget_mib {
            return Err(Busy::TooLarge { wanted_mib, budget_mib });
        }
        Ok(())
    }

    /// Returns the free memory and the budget of all VMs, in MiB.
    pub(crate) fn free_and_budget_mib(&self) -> (usize, usize) {
        (self.free.available_permits(), self.budget_mib)
    }

    /// Reserves memory, if enough is free right now.
    pub(crate) fn admit_now(&self, memory: MemoryMib) -> Option<Admitted> {
        let permit = Arc::clone(&self.free).try_acquire_many_owned(self.wanted_mib(memory));
        permit.ok().map(|permit| self.admitted(Some(permit)))
    }

    /// Reserves memory for a VM that has its memory already. If less is free, reserves only that.
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
    async fn dropped_reservation_frees_memory_for_one_other_vm() {
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
    async fn waiting_request_gets_memory_that_another_vm_frees() {
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
