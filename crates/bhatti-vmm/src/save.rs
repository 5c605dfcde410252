//! Takes snapshots: captures the state while the VM is paused, and makes it durable afterwards.

use std::fs::File;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use bhatti_engine::{Captured, Disks, SnapshotError, SnapshotInfo, SnapshotRequest};
use tokio::task::spawn_blocking;

use crate::draft::{Draft, copy_files};
use crate::files::{STATE_BYTES_MAX, read_at_most};
use crate::generation::{Generation, volume_generations};
use crate::manifest::{Manifest, PAGES, SavedMemory};
use crate::record::Record;
use crate::vmm::{Running, Saved, Unfinished, VmState, Vmm};

/// See [`Vm::capture`](bhatti_engine::Vm::capture).
pub(crate) async fn capture<V: Vmm>(
    vm: &Running<V>,
    request: &SnapshotRequest,
) -> Result<Box<dyn Captured>, SnapshotError> {
    let failed = |step| move |source| SnapshotError::Vmm { step, source };
    let vmm = &vm.vmm;
    if vmm.state(vm).await.map_err(failed("report whether the VM runs"))? != VmState::Paused {
        return Err(SnapshotError::NotPaused);
    }
    vmm.settle_disk(vm).await.map_err(failed("end its jobs on the disk"))?;
    let version = vmm.version(vm).await.map_err(failed("report its version"))?;
    let draft = Draft::create(&request.directory).await?;
    let capture = vm.record.begin_capture();
    let saved = vmm.save(vm, request, draft.path()).await?;
    if request.disks == Disks::Frozen {
        vmm.freeze_disk(vm, draft.path(), &saved.machine.disk).await?;
    }
    copy_files(&request.copies, draft.path()).await?;
    Ok(Box::new(SnapshotWriter {
        vmm: Arc::clone(vmm),
        record: Arc::clone(&vm.record),
        draft,
        saved,
        capture,
        version,
        disks: request.disks,
        copies: request.copies.iter().map(|copy| copy.name.clone()).collect(),
    }))
}

/// A captured snapshot that is not durable yet.
struct SnapshotWriter<V> {
    vmm: Arc<V>,
    record: Arc<Record>,
    draft: Draft,
    saved: Saved,
    capture: u64,
    version: String,
    disks: Disks,
    copies: Vec<String>,
}

#[async_trait]
impl<V: Vmm> Captured for SnapshotWriter<V> {
    async fn finish(self: Box<Self>) -> Result<SnapshotInfo, SnapshotError> {
        let finished = spawn_blocking(move || self.settle());
        let failed = |source| SnapshotError::File { step: "put the snapshot in place", source };
        finished.await.map_err(io::Error::other).and_then(|settled| settled).map_err(failed)
    }
}

impl<V: Vmm> SnapshotWriter<V> {
    fn settle(mut self) -> io::Result<SnapshotInfo> {
        let draft = self.draft.path().to_owned();
        let state = read_at_most(&draft.join(V::STATE), STATE_BYTES_MAX)?;
        let unfinished = Unfinished {
            draft: &draft,
            disks: self.disks,
            record: &self.record,
            capture: self.capture,
        };
        self.vmm.settle_memory(&mut self.saved, &unfinished)?;
        self.sync_files()?;
        self.manifest(&state)?.write(&draft)?;
        self.draft.put_in_place()?;
        let Saved { kind, memory_bytes, .. } = self.saved;
        Ok(SnapshotInfo { memory: kind, memory_bytes, device_bytes: state.len() as u64 })
    }

    fn manifest(&self, state: &[u8]) -> io::Result<Manifest> {
        let machine = self.saved.machine.clone();
        let (disk_generation, volume_generations) = match self.disks {
            Disks::InPlace => (
                Some(Generation::of(&self.record.directory().join(&machine.disk))?),
                volume_generations(&machine.volumes)?,
            ),
            Disks::Frozen => (None, Vec::new()),
        };
        Ok(Manifest {
            format: V::FORMAT,
            vmm_version: self.version.clone(),
            vmm_machine: self.vmm.capabilities().machine,
            machine,
            memory: self.saved.memory.clone(),
            state_hash: blake3::hash(state).to_string(),
            disk_generation,
            volume_generations,
        })
    }

    /// Makes all files durable that the manifest will name.
    fn sync_files(&self) -> io::Result<()> {
        let draft = self.draft.path();
        let machine = &self.saved.machine;
        let memory = match &self.saved.memory {
            SavedMemory::Full { .. } => machine.memory_file(),
            SavedMemory::Diff { .. } => PAGES,
        };
        let disks = match self.disks {
            Disks::InPlace => self.record.directory(),
            Disks::Frozen => draft,
        };
        let own = [V::STATE, memory].map(|name| draft.join(name)).into_iter();
        let copies = self.copies.iter().map(|name| draft.join(name));
        for file in own.chain([disks.join(&machine.disk)]).chain(copies) {
            File::open(file)?.sync_all()?;
        }
        Ok(())
    }
}
