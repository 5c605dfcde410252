//! An engine without VMs, which finds the VMs that a test says are there.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bhatti_engine::{
    Accelerator, AdoptError, AgentChannel, AgentStream, BootError, Capabilities, Captured,
    ChannelError, Engine, RemoveError, RestoreError, RestoreSpec, SnapshotError, SnapshotRequest,
    Staged, Vm, VmSpec, VmmError,
};
use bhatti_host::process::Usage;
use bhatti_types::SandboxId;

/// What a daemon finds of a sandbox's VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A VM that runs.
    Running,
    /// A paused VM.
    Paused,
    /// A VMM that does not answer.
    Broken,
    /// No VMM.
    Nothing,
}

/// An engine that boots nothing and finds the VMs that [`leave`](Self::leave) names.
#[derive(Default)]
pub struct FoundVms {
    found: Mutex<HashMap<SandboxId, Found>>,
    refusals: AtomicU32,
    merges: Arc<AtomicU32>,
    captures: Arc<AtomicU32>,
}

impl FoundVms {
    /// Leaves a VMM for the next daemon to find.
    ///
    /// # Panics
    ///
    /// Panics if another test thread panicked in this engine.
    pub fn leave(&self, id: SandboxId, found: Found) {
        self.found.lock().expect("no thread panicked").insert(id, found);
    }

    /// Returns what is left of a sandbox's VMM; `None` if it was ended or never left.
    ///
    /// # Panics
    ///
    /// As [`leave`](Self::leave).
    #[must_use]
    pub fn get(&self, id: SandboxId) -> Option<Found> {
        self.found.lock().expect("no thread panicked").get(&id).copied()
    }

    /// Has the next removals fail: a VMM that does not end, or a file that stays.
    pub fn refuse_removals(&self, times: u32) {
        self.refusals.store(times, Ordering::SeqCst);
    }

    /// Returns how many merges of disks have begun. A merge here never ends by itself.
    #[must_use]
    pub fn merges(&self) -> u32 {
        self.merges.load(Ordering::SeqCst)
    }

    /// Returns how many snapshots were requested. Each is refused.
    #[must_use]
    pub fn captures(&self) -> u32 {
        self.captures.load(Ordering::SeqCst)
    }

    fn end(&self, id: SandboxId) {
        self.found.lock().expect("no thread panicked").remove(&id);
    }
}

struct FoundVm {
    runs: bool,
    merges: Arc<AtomicU32>,
    captures: Arc<AtomicU32>,
}

#[async_trait]
impl Engine for FoundVms {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "simulated",
            accelerator: Some(Accelerator::Tcg),
            saves_memory: true,
            shares_kernel: false,
            vmm_mib: 48,
            machine: "m".to_owned(),
            exchanges_disks: true,
            replaces_root: false,
        }
    }

    async fn boot(&self, _: &VmSpec) -> Result<Arc<dyn Vm>, BootError> {
        panic!("the simulated engine boots no VM")
    }

    async fn stage(&self, _: &RestoreSpec) -> Result<Box<dyn Staged>, RestoreError> {
        panic!("the simulated engine restores no VM")
    }

    async fn adopt(&self, id: SandboxId, _: &Path) -> Result<Arc<dyn Vm>, AdoptError> {
        match self.get(id).unwrap_or(Found::Nothing) {
            Found::Nothing => Err(AdoptError::Gone),
            Found::Broken => Err(AdoptError::Broken {
                step: "connect",
                source: io::ErrorKind::ConnectionRefused.into(),
            }),
            found => {
                let (merges, captures) = (Arc::clone(&self.merges), Arc::clone(&self.captures));
                Ok(Arc::new(FoundVm { runs: found == Found::Running, merges, captures }))
            }
        }
    }

    async fn kill(&self, id: SandboxId, _: &Path) -> Result<(), RemoveError> {
        self.end(id);
        Ok(())
    }

    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        let refused = self
            .refusals
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if refused.is_ok() {
            return Err(RemoveError::Unkillable { pid: 1 });
        }
        self.end(id);
        drop(std::fs::remove_dir_all(directory));
        Ok(())
    }
}

/// The channel of a guest that does not answer.
struct Silent;

#[async_trait]
impl AgentChannel for Silent {
    async fn open(&self, _: u32) -> Result<Box<dyn AgentStream>, ChannelError> {
        Err(ChannelError(io::ErrorKind::ConnectionRefused.into()))
    }
}

#[async_trait]
impl Vm for FoundVm {
    fn channel(&self) -> Arc<dyn AgentChannel> {
        Arc::new(Silent)
    }

    async fn is_running(&self) -> Result<bool, VmmError> {
        Ok(self.runs)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmmError> {
        Ok(())
    }

    async fn merge_disk(&self, _: bool) -> Result<bool, VmmError> {
        self.merges.fetch_add(1, Ordering::SeqCst);
        std::future::pending().await
    }

    async fn capture(&self, _: &SnapshotRequest) -> Result<Box<dyn Captured>, SnapshotError> {
        self.captures.fetch_add(1, Ordering::SeqCst);
        Err(SnapshotError::Unsupported("there is no VM"))
    }

    async fn ended(&self) {
        std::future::pending::<()>().await;
    }

    fn usage(&self) -> io::Result<Usage> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn console_tail(&self) -> String {
        String::new()
    }
}
