//! Saves devices, memory and disk of a paused VM.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::{Disks, MemoryKind, SnapshotError, SnapshotRequest, VmmError};
use bhatti_host::durable;
use bhatti_host::memory::MappedFile;
use bhatti_vmm::{
    Machine, PAGES, Record, Running, STATE_BYTES_MAX, Saved, SavedMemory, Vmm, memory_name,
    on_thread,
};
use serde_json::json;

use crate::Qemu;
use crate::command_line::ROOT_DRIVE;
use crate::{layers, overlay, pages};

/// How long QEMU may take to write the state of its devices.
const SAVE_LIMIT: Duration = Duration::from_secs(60);

/// If a diff is larger than this fraction of a full snapshot, and not small, it is not worth
/// keeping its base: the snapshot is full instead.
const FULL_WORTH: u64 = 2;
const SMALL_DIFF_BYTES: u64 = 64 << 20;

/// Makes QEMU write the devices' state to a file in its own directory, the only place where it
/// may write, and copies the file to `devices`.
pub(crate) async fn save_devices(vm: &Running<Qemu>, devices: &Path) -> Result<(), SnapshotError> {
    const STEP: &str = "save the devices";
    let (own, record) = (vm.directory().join(Qemu::STATE), Arc::clone(&vm.record));
    let created = own.clone();
    on_thread(STEP, move || {
        File::create(&created)?;
        let disk = record.directory().join(&record.machine().disk);
        bhatti_vmm::give_as(&created, &disk).or_else(|error| {
            fs::remove_file(&created)?;
            Err(error)
        })
    })
    .await?;
    let arguments = json!({ "filename": own });
    let saved = vm.control.execute("xen-save-devices-state", arguments, SAVE_LIMIT).await;
    let (devices, is_saved) = (devices.to_owned(), saved.is_ok());
    let copied = on_thread(STEP, move || {
        let copied = if is_saved { copy_devices(&own, &devices) } else { Ok(()) };
        copied.and(fs::remove_file(&own))
    });
    let copied = copied.await;
    saved.map_err(|source| SnapshotError::Vmm { step: STEP, source }).and(copied)
}

/// Copies the state that QEMU wrote, up to a limit: a guest may have taken QEMU over.
fn copy_devices(from: &Path, to: &Path) -> io::Result<()> {
    let mut state = File::open(from)?.take(STATE_BYTES_MAX + 1);
    let copied = io::copy(&mut state, &mut durable::create_sealed(to)?)?;
    if copied > STATE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the devices' state is too long"));
    }
    Ok(())
}

/// Saves the memory, and links its base into a snapshot with frozen disks.
pub(crate) async fn save_memory(
    vm: &Running<Qemu>,
    request: &SnapshotRequest,
    draft: &Path,
) -> Result<Saved, SnapshotError> {
    let mut machine = vm.record.machine();
    let (pid, wanted, disks) = (vm.process.id().pid, request.memory, request.disks);
    let (base, draft) = (vm.directory().join(machine.memory_file()), draft.to_owned());
    on_thread("save the memory", move || {
        let mapped = MappedFile::open(pid, &base)?;
        let kind = match wanted {
            Some(kind) => kind,
            None => choose(pages::measure(&mapped, &base)?),
        };
        let (memory, memory_bytes) = match kind {
            MemoryKind::Diff => {
                let (bytes, hash) = pages::write_diff(&mapped, &draft.join(PAGES))?;
                if disks == Disks::Frozen {
                    layers::share(&base, &draft, machine.memory_file())?;
                }
                (SavedMemory::Diff { hash: hash.to_string() }, bytes)
            }
            MemoryKind::Full => {
                let unnamed = draft.join("memory.new");
                let (bytes, hash) = pages::write_full(&mapped, &base, &unnamed)?;
                let name = memory_name(&hash);
                fs::rename(unnamed, draft.join(&name))?;
                machine.memory = Some(name);
                (SavedMemory::Full { file: None }, bytes)
            }
        };
        Ok(Saved { machine, memory, kind, memory_bytes })
    })
    .await
}

const fn choose((private_bytes, all_bytes): (u64, u64)) -> MemoryKind {
    if private_bytes > SMALL_DIFF_BYTES && private_bytes > all_bytes / FULL_WORTH {
        MemoryKind::Full
    } else {
        MemoryKind::Diff
    }
}

/// Freezes the disk for the snapshot, and gives the VM a new layer over it.
pub(crate) async fn freeze_disk(
    vm: &Running<Qemu>,
    draft: &Path,
    disk: &str,
) -> Result<(), SnapshotError> {
    const STEP: &str = "freeze the disk";
    let directory = vm.directory().to_owned();
    let own = directory.clone();
    let top = disk.to_owned();
    if on_thread(STEP, move || overlay::chain(&own, &top)).await?.len() >= overlay::LAYERS_MAX {
        return Err(SnapshotError::Unsupported(
            "the disk has too many layers: it was forked or saved too often",
        ));
    }
    let (record, top) = (Arc::clone(&vm.record), disk.to_owned());
    let (layer, before) = on_thread(STEP, move || record_layer(&record, &top)).await?;
    let path = directory.join(&layer);
    let arguments = json!({
        "device": ROOT_DRIVE, "snapshot-file": path, "format": "qcow2", "mode": "existing",
    });
    if let Err(source) = vm.control.ask("blockdev-snapshot-sync", arguments).await {
        // Only a refusal means that QEMU does not use the new layer. Otherwise the layer stays:
        // while it is empty, it changes nothing.
        if matches!(source, VmmError::Refused(_)) {
            let record = Arc::clone(&vm.record);
            let undo = move || {
                record.change(|machine| *machine = before)?;
                fs::remove_file(&path)
            };
            on_thread(STEP, undo).await?;
        }
        return Err(SnapshotError::Vmm { step: STEP, source });
    }
    let (draft, disk) = (draft.to_owned(), disk.to_owned());
    on_thread(STEP, move || layers::share_layers(&directory, &disk, &draft)).await
}

/// Creates a layer over `disk`, and records it before QEMU writes to it: an empty layer has the
/// content of the old layer below it. Returns its name, and the machine as it was before.
fn record_layer(record: &Record, disk: &str) -> io::Result<(String, Machine)> {
    let directory = record.directory();
    let layer = layers::add_layer(directory, disk)?;
    let path = directory.join(&layer);
    if let Err(error) = bhatti_vmm::give_as(&path, &directory.join(disk)) {
        fs::remove_file(&path)?;
        return Err(error);
    }
    let before = record.change(|machine| machine.disk.clone_from(&layer))?;
    Ok((layer, before))
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
