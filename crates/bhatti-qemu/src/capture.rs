//! Takes snapshots: captures the state while the VM is paused, and makes it durable afterwards.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{
    Captured, Disks, MemoryKind, SnapshotError, SnapshotInfo, SnapshotRequest, Vm, VmmError,
};
use bhatti_host::durable;
use bhatti_host::memory::MappedFile;
use bhatti_vmm::{
    Draft, Generation, STATE_BYTES_MAX, copy_files, memory_name, read_at_most, volume_generations,
};
use serde_json::json;
use tokio::task::spawn_blocking;

use crate::command_line::ROOT_DRIVE;
use crate::manifest::{self, DEVICES, Manifest, Memory, PAGES};
use crate::record::Machine;
use crate::vm::QemuVm;
use crate::{files, merge, overlay, pages};

/// How long QEMU may take to write the state of its devices.
const SAVE_LIMIT: Duration = Duration::from_secs(60);

/// If a diff is larger than this fraction of a full snapshot, and not small, it is not worth
/// keeping its base: the snapshot is full instead.
const FULL_WORTH: u64 = 2;
const SMALL_DIFF_BYTES: u64 = 64 << 20;

/// Maximum size of the devices' state, in bytes. The current machine's state has some hundred
/// KiB.
const DEVICES_BYTES_MAX: u64 = 64 << 20;

/// See [`Vm::capture`].
pub(crate) async fn capture(
    vm: &QemuVm,
    request: &SnapshotRequest,
) -> Result<Box<dyn Captured>, SnapshotError> {
    let vmm = |step| move |source| SnapshotError::Vmm { step, source };
    if vm.is_running().await.map_err(vmm("report whether the VM runs"))? {
        return Err(SnapshotError::NotPaused);
    }
    merge::settle_jobs(vm).await.map_err(vmm("end its jobs on the disk"))?;
    let version = vm.qmp.version(&vm.directory).await.map_err(vmm("report its version"))?;
    let draft = Draft::create(&request.directory)?;
    save_devices(vm, &draft.path().join(DEVICES)).await?;
    let (memory, machine, memory_bytes) = save_memory(vm, request, draft.path()).await?;
    let disk = machine.disk.clone();
    if request.disks == Disks::Frozen {
        freeze(vm, draft.path(), &disk).await?;
    }
    copy_files(&request.copies, draft.path()).await?;
    let manifest = Manifest {
        format: manifest::FORMAT,
        vmm_version: version,
        vmm_machine: vm.depends_on.clone(),
        machine,
        memory,
        memory_bytes,
        devices_hash: String::new(),
        devices_bytes: 0,
        disk_generation: None,
        volume_generations: Vec::new(),
    };
    let disks_directory = match request.disks {
        Disks::InPlace => vm.directory.clone(),
        Disks::Frozen => draft.path().to_owned(),
    };
    let disk = disks_directory.join(disk);
    Ok(Box::new(Draught {
        draft,
        manifest,
        disk,
        disks: request.disks,
        copies: request.copies.iter().map(|copy| copy.name.clone()).collect(),
    }))
}

/// Makes QEMU write the devices' state to a file in its own directory, the only place where it
/// may write, and copies the file to `devices`.
async fn save_devices(vm: &QemuVm, devices: &Path) -> Result<(), SnapshotError> {
    let failed = |source| SnapshotError::File { step: "save the devices", source };
    let own = vm.directory.join(DEVICES);
    File::create(&own).map_err(failed)?;
    let disk = vm.directory.join(&vm.machine.lock().disk);
    if let Err(error) = bhatti_vmm::give_as(&own, &disk) {
        fs::remove_file(&own).map_err(failed)?;
        return Err(failed(error));
    }
    let arguments = json!({ "filename": own });
    let saved =
        vm.qmp.execute(&vm.directory, "xen-save-devices-state", arguments, SAVE_LIMIT).await;
    let put = match saved {
        Ok(_) => {
            let (from, to) = (own.clone(), devices.to_owned());
            let copied = spawn_blocking(move || copy_devices(&from, &to)).await;
            copied.map_err(io::Error::other).and_then(|copied| copied).map_err(failed)
        }
        Err(source) => Err(SnapshotError::Vmm { step: "save the devices", source }),
    };
    let removed = fs::remove_file(&own).map_err(failed);
    put.and(removed)
}

/// Copies the state that QEMU wrote, up to a limit: a guest may have taken QEMU over.
fn copy_devices(from: &Path, to: &Path) -> io::Result<()> {
    let mut state = File::open(from)?.take(DEVICES_BYTES_MAX + 1);
    let copied = io::copy(&mut state, &mut durable::create_sealed(to)?)?;
    if copied > DEVICES_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the devices' state is too long"));
    }
    Ok(())
}

/// Saves the memory, and links its base into a snapshot with frozen disks.
async fn save_memory(
    vm: &QemuVm,
    request: &SnapshotRequest,
    draft: &Path,
) -> Result<(Memory, Machine, u64), SnapshotError> {
    let failed = |source| SnapshotError::File { step: "save the memory", source };
    let mut machine = vm.machine.lock().clone();
    let (pid, wanted, disks) = (vm.process.id().pid, request.memory, request.disks);
    let (base, draft) = (vm.directory.join(&machine.memory), draft.to_owned());
    let saved = spawn_blocking(move || -> io::Result<(Memory, Machine, u64)> {
        let mapped = MappedFile::open(pid, &base)?;
        let kind = match wanted {
            Some(kind) => kind,
            None => choose(pages::measure(&mapped, &base)?),
        };
        match kind {
            MemoryKind::Diff => {
                let (bytes, hash) = pages::write_diff(&mapped, &draft.join(PAGES))?;
                if disks == Disks::Frozen {
                    files::share(&base, &draft, &machine.memory)?;
                }
                Ok((Memory::Diff { hash: hash.to_string() }, machine, bytes))
            }
            MemoryKind::Full => {
                let unnamed = draft.join("memory.new");
                let (bytes, hash) = pages::write_full(&mapped, &base, &unnamed)?;
                machine.memory = memory_name(&hash);
                fs::rename(unnamed, draft.join(&machine.memory))?;
                Ok((Memory::Full { hash: hash.to_string() }, machine, bytes))
            }
        }
    });
    saved.await.map_err(io::Error::other).and_then(|saved| saved).map_err(failed)
}

const fn choose((private_bytes, all_bytes): (u64, u64)) -> MemoryKind {
    if private_bytes > SMALL_DIFF_BYTES && private_bytes > all_bytes / FULL_WORTH {
        MemoryKind::Full
    } else {
        MemoryKind::Diff
    }
}

/// Freezes the disk for the snapshot, and gives the VM a new layer over it.
async fn freeze(vm: &QemuVm, draft: &Path, disk: &str) -> Result<(), SnapshotError> {
    let failed = |source| SnapshotError::File { step: "freeze the disk", source };
    let layers = overlay::chain(&vm.directory, disk).map_err(failed)?;
    if layers.len() >= overlay::LAYERS_MAX {
        return Err(SnapshotError::Unsupported(
            "the disk has too many layers: it was forked or saved too often",
        ));
    }
    let layer = files::new_layer_name().map_err(failed)?;
    let path = vm.directory.join(&layer);
    overlay::create(&path, disk).map_err(|error| failed(io::Error::other(error)))?;
    if let Err(error) = bhatti_vmm::give_as(&path, &vm.directory.join(disk)) {
        fs::remove_file(&path).map_err(failed)?;
        return Err(failed(error));
    }
    let before = vm.machine.lock().clone();
    // Record the new layer before QEMU writes to it: an empty layer has the content of the old
    // layer below it.
    vm.record(Machine { disk: layer, ..before.clone() }).map_err(failed)?;
    let arguments = json!({
        "device": ROOT_DRIVE, "snapshot-file": path, "format": "qcow2", "mode": "existing",
    });
    if let Err(source) = vm.ask("blockdev-snapshot-sync", arguments).await {
        // Only a refusal means that QEMU does not use the new layer. Otherwise the layer stays:
        // while it is empty, it changes nothing.
        if matches!(source, VmmError::Refused(_)) {
            vm.record(before).map_err(failed)?;
            fs::remove_file(&path).map_err(failed)?;
        }
        return Err(SnapshotError::Vmm { step: "freeze the disk", source });
    }
    files::share_layers(&vm.directory, disk, draft).map_err(failed)
}

/// A captured snapshot that is not durable yet.
struct Draught {
    draft: Draft,
    manifest: Manifest,
    disk: PathBuf,
    disks: Disks,
    copies: Vec<String>,
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
        let directory = self.draft.path().to_owned();
        let devices = read_at_most(&directory.join(DEVICES), STATE_BYTES_MAX)?;
        self.manifest.devices_hash = blake3::hash(&devices).to_string();
        self.manifest.devices_bytes = devices.len() as u64;
        let memory = match &self.manifest.memory {
            Memory::Full { .. } => &self.manifest.machine.memory,
            Memory::Diff { .. } => PAGES,
        };
        let files = [directory.join(DEVICES), directory.join(memory), self.disk.clone()];
        for file in files.into_iter().chain(self.copies.iter().map(|name| directory.join(name))) {
            File::open(file)?.sync_all()?;
        }
        if self.disks == Disks::InPlace {
            self.manifest.disk_generation = Some(Generation::of(&self.disk)?);
            self.manifest.volume_generations = volume_generations(&self.manifest.machine.volumes)?;
        }
        let text = serde_json::to_vec_pretty(&self.manifest)?;
        durable::write_sealed(&directory.join(manifest::FILE), &text)?;
        self.draft.put_in_place()?;
        Ok(SnapshotInfo {
            memory: self.manifest.memory.kind(),
            memory_bytes: self.manifest.memory_bytes,
            device_bytes: self.manifest.devices_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oversized_device_state_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let state = File::create(&from).unwrap();
        state.set_len(4096).unwrap();
        copy_devices(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), [0; 4096]);

        state.set_len(1 << 40).unwrap();
        let refused = copy_devices(&from, &directory.path().join("other")).unwrap_err();

        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    }
}
