//! Takes snapshots: captures the state while the VM is paused, and makes it durable afterwards.
//!
//! Firecracker reports the pages dirtied since its previous report. If one report is lost, the
//! next diff has no base: after a discarded snapshot, the next snapshot contains all pages. The
//! base of a booted VM is empty memory until its first snapshot.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{Captured, Disks, MemoryKind, SnapshotError, SnapshotInfo, SnapshotRequest};
use bhatti_host::process::ProcessId;
use bhatti_host::{disk, durable};
use bhatti_vmm::{
    Draft, Generation, STATE_BYTES_MAX, copy_files, new_name, read_at_most, remove_other_memory,
    share, volume_generations,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::api::State;
use crate::jail;
use crate::machine::{DISK, Machine, Record};
use crate::manifest::{self, Manifest, Memory, PAGES, STATE};
use crate::memory;
use crate::vm::{FirecrackerVm, Known};

/// The sparse file that Firecracker writes the memory to.
const SPARSE: &str = "memory.sparse";

/// How long Firecracker may take to write the memory.
const SAVE_LIMIT: Duration = Duration::from_secs(600);

/// See [`Vm::capture`](bhatti_engine::Vm::capture).
pub(crate) async fn capture(
    vm: &FirecrackerVm,
    request: &SnapshotRequest,
) -> Result<Box<dyn Captured>, SnapshotError> {
    let vmm = |step| move |source| SnapshotError::Vmm { step, source };
    let file = |step| move |source| SnapshotError::File { step, source };
    let instance = vm.api.instance().await.map_err(vmm("report whether the VM runs"))?;
    if instance.state != State::Paused {
        return Err(SnapshotError::NotPaused);
    }
    let draft = Draft::create(&request.directory)?;
    let (machine, number) = forget_memory(vm).map_err(file("record that the VM is being saved"))?;
    let kind = request.memory.unwrap_or(match machine.memory {
        Some(_) => MemoryKind::Diff,
        None => MemoryKind::Full,
    });
    let has_base = kind == MemoryKind::Diff && machine.memory.is_some();
    let asked = if has_base || machine.is_unsaved { "Diff" } else { "Full" };
    let ask = json!({
        "snapshot_type": asked,
        "snapshot_path": STATE,
        "mem_file_path": SPARSE,
    });
    let saved = save(vm, &ask, draft.path()).await;
    if saved.is_err() {
        // The partial files only take space, which matters most if the disk is full.
        if let Err(error) = remove_unfinished(vm) {
            tracing::warn!(%error, "Failed to remove an unfinished snapshot");
        }
    }
    saved?;
    if request.disks == Disks::Frozen {
        let (from, to) = (vm.directory.join(DISK), draft.path().join(DISK));
        let copied = spawn_blocking(move || disk::copy(&from, &to)).await;
        copied
            .map_err(io::Error::other)
            .and_then(|copied| copied)
            .map_err(file("copy the disk"))?;
    }
    copy_files(&request.copies, draft.path()).await?;
    let manifest = Manifest {
        format: manifest::FORMAT,
        vmm_version: instance.vmm_version,
        vmm_machine: vm.depends_on.clone(),
        machine,
        memory: Memory::Diff { hash: String::new() },
        state_hash: String::new(),
        disk_generation: None,
        volume_generations: Vec::new(),
    };
    Ok(Box::new(Draught {
        draft,
        manifest,
        kind,
        disks: request.disks,
        copies: request.copies.iter().map(|copy| copy.name.clone()).collect(),
        directory: vm.directory.clone(),
        process: vm.process.id(),
        known: Arc::clone(&vm.state),
        number,
    }))
}

/// Makes Firecracker save the VM, and moves the files that it wrote to `place`.
async fn save(vm: &FirecrackerVm, ask: &Value, place: &Path) -> Result<(), SnapshotError> {
    let failed = |step| move |source| SnapshotError::File { step, source };
    // A daemon that died during a snapshot leaves partial files, into which Firecracker would
    // write a diff.
    remove_unfinished(vm).map_err(failed("remove an unfinished snapshot"))?;
    let told = vm.api.put("/snapshot/create", ask, SAVE_LIMIT).await;
    // Firecracker makes the guest forget its connections, whether or not the snapshot succeeds.
    vm.channel.reset();
    told.map_err(|source| SnapshotError::Vmm { step: "save the VM", source })?;
    let (directory, place) = (vm.directory.clone(), place.to_owned());
    let taken = spawn_blocking(move || {
        let mut names = [STATE, SPARSE].into_iter();
        names.try_for_each(|name| jail::take(&directory, name, &place.join(name)))
    });
    let taken = taken.await.map_err(io::Error::other).and_then(|taken| taken);
    taken.map_err(failed("move the files that Firecracker saved"))
}

/// Removes the files that Firecracker wrote for a snapshot.
fn remove_unfinished(vm: &FirecrackerVm) -> io::Result<()> {
    [STATE, SPARSE].into_iter().try_for_each(|name| jail::expel(&vm.directory, name))
}

/// Records that the dirty pages are unknown, before Firecracker resets its list of them. Returns
/// the machine as it was before, and the number of this capture.
fn forget_memory(vm: &FirecrackerVm) -> io::Result<(Machine, u64)> {
    let mut known = vm.state.lock();
    let before = known.machine.clone();
    // The VM has run since it was restored: no snapshot based on another memory file can be
    // restored again.
    remove_other_memory(&vm.directory, before.memory.as_deref().unwrap_or_default())?;
    let number = known.captures.fetch_add(1, Ordering::SeqCst) + 1;
    let machine = Machine { memory: None, is_unsaved: false, ..before.clone() };
    vm.record(&machine)?;
    known.machine = machine;
    Ok((before, number))
}

/// A captured snapshot that is not durable yet.
struct Draught {
    draft: Draft,
    manifest: Manifest,
    kind: MemoryKind,
    disks: Disks,
    copies: Vec<String>,
    directory: PathBuf,
    process: ProcessId,
    known: Arc<Mutex<Known>>,
    number: u64,
}

#[async_trait]
impl Captured for Draught {
    async fn finish(self: Box<Self>) -> Result<SnapshotInfo, SnapshotError> {
        let finished = spawn_blocking(move || self.settle());
        let failed = |source| SnapshotError::File { step: "put the snapshot in place", source };
        finished.await.map_err(io::Error::other).and_then(|settled| settled).map_err(failed)
    }
}

impl Draught {
    fn settle(mut self) -> io::Result<SnapshotInfo> {
        let state = read_at_most(&self.draft.path().join(STATE), STATE_BYTES_MAX)?;
        self.manifest.state_hash = blake3::hash(&state).to_string();
        let (memory, memory_bytes) = self.settle_memory()?;
        let place = |name: &str| self.draft.path().join(name);
        let mut files = vec![place(STATE), place(&memory)];
        files.extend(self.copies.iter().map(|name| place(name)));
        match self.disks {
            Disks::InPlace => files.push(self.directory.join(DISK)),
            Disks::Frozen => files.push(place(DISK)),
        }
        for file in files {
            File::open(file)?.sync_all()?;
        }
        if self.disks == Disks::InPlace {
            self.manifest.disk_generation = Some(Generation::of(&self.directory.join(DISK))?);
            self.manifest.volume_generations = volume_generations(&self.manifest.machine.volumes)?;
        }
        let whole = match &self.manifest.memory {
            Memory::Whole { file } if self.disks == Disks::Frozen => Some(file.clone()),
            _ => None,
        };
        if let Some(name) = &whole {
            self.stand_on(name)?;
        }
        durable::write_sealed(&place(manifest::FILE), &serde_json::to_vec_pretty(&self.manifest)?)?;
        self.draft.put_in_place()?;
        Ok(SnapshotInfo { memory: self.kind, memory_bytes, device_bytes: state.len() as u64 })
    }

    /// Converts the memory that Firecracker wrote to the snapshot's format, and completes the
    /// manifest. Returns the file's name, and the size of its pages in bytes.
    fn settle_memory(&mut self) -> io::Result<(String, u64)> {
        let draft = self.draft.path();
        let sparse = draft.join(SPARSE);
        self.check_memory(&sparse)?;
        let base = self.manifest.machine.memory.take();
        let is_diff = self.kind == MemoryKind::Diff && base.is_some();
        let whole = if is_diff { None } else { Some(memory::dig_holes(&sparse)?) };
        if self.kind == MemoryKind::Diff && self.disks == Disks::InPlace {
            let (bytes, hash) = memory::list_pages(&sparse, &draft.join(PAGES))?;
            self.manifest.machine.memory = base;
            self.manifest.memory = Memory::Diff { hash: hash.to_string() };
            return Ok((PAGES.to_owned(), bytes));
        }
        let file = new_name("memory-", ".img")?;
        let bytes = match (whole, base) {
            (None, Some(base)) => {
                let bytes =
                    memory::with_diff(&self.directory.join(base), &sparse, &draft.join(&file))?;
                fs::remove_file(&sparse)?;
                bytes
            }
            (whole, _) => {
                fs::rename(&sparse, draft.join(&file))?;
                whole.unwrap_or_default()
            }
        };
        self.manifest.memory = Memory::Whole { file: file.clone() };
        Ok((file, bytes))
    }

    /// Checks that Firecracker wrote exactly the guest's memory: the file takes space on the
    /// host's disk.
    fn check_memory(&self, sparse: &Path) -> io::Result<()> {
        let memory = u64::from(self.manifest.machine.memory_mib) << 20;
        let bytes = fs::metadata(sparse)?.len();
        if bytes == memory {
            return Ok(());
        }
        Err(io::Error::other(format!("the saved memory has {bytes} bytes instead of {memory}")))
    }

    /// Makes `name` the base of the VM, which continues: its dirty pages are relative to this
    /// file from now on.
    fn stand_on(&self, name: &str) -> io::Result<()> {
        let mut known = self.known.lock();
        if known.captures.load(Ordering::SeqCst) != self.number {
            return Ok(());
        }
        share(&self.draft.path().join(name), &self.directory, name)?;
        let machine = Machine { memory: Some(name.to_owned()), ..known.machine.clone() };
        Record::new(self.process, machine.clone()).write(&self.directory)?;
        known.machine = machine;
        // The VM maps its previous memory file, so the file's content exists for as long as the
        // VM runs.
        remove_other_memory(&self.directory, name)
    }
}
