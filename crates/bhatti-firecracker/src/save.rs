//! Saves a paused VM.
//!
//! Firecracker reports the pages dirtied since its previous report. If one report is lost, the
//! next diff has no base: after a discarded snapshot, the next snapshot contains all pages. The
//! base of a booted VM is empty memory until its first snapshot.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::{Disks, MemoryKind, SnapshotError, SnapshotRequest};
use bhatti_vmm::{
    Machine, PAGES, Record, Running, Saved, SavedMemory, Unfinished, Vmm, new_name, on_thread,
    remove_other_memory, share,
};
use serde_json::{Value, json};

use crate::{Firecracker, jail, memory};

/// The sparse file that Firecracker writes the memory to.
const SPARSE: &str = "memory.sparse";

/// How long Firecracker may take to write the memory.
const SAVE_LIMIT: Duration = Duration::from_secs(600);

/// See [`Vmm::save`]. [`settle_memory`] completes the result.
pub(crate) async fn save(
    vm: &Running<Firecracker>,
    request: &SnapshotRequest,
    draft: &Path,
) -> Result<Saved, SnapshotError> {
    let record = Arc::clone(&vm.record);
    let forget = move || forget_memory(&record);
    let machine = on_thread("record that the VM is being saved", forget).await?;
    let kind = request.memory.unwrap_or(match machine.memory {
        Some(_) => MemoryKind::Diff,
        None => MemoryKind::Full,
    });
    let has_base = kind == MemoryKind::Diff && machine.memory.is_some();
    let asked = if has_base || machine.is_unsaved { "Diff" } else { "Full" };
    let ask = json!({
        "snapshot_type": asked,
        "snapshot_path": Firecracker::STATE,
        "mem_file_path": SPARSE,
    });
    let written = write(vm, &ask, draft).await;
    if written.is_err() {
        // The partial files only take space, which matters most if the disk is full.
        let directory = vm.directory().to_owned();
        let removed = on_thread("remove", move || remove_unfinished(&directory));
        if let Err(error) = removed.await {
            tracing::warn!(%error, "Failed to remove an unfinished snapshot");
        }
    }
    written?;
    Ok(Saved { machine, memory: SavedMemory::Full { file: None }, kind, memory_bytes: 0 })
}

/// Makes Firecracker save the VM, and moves the files that it wrote to `draft`.
async fn write(vm: &Running<Firecracker>, ask: &Value, draft: &Path) -> Result<(), SnapshotError> {
    // A daemon that died during a snapshot leaves partial files, into which Firecracker would
    // write a diff.
    let directory = vm.directory().to_owned();
    on_thread("remove an unfinished snapshot", move || remove_unfinished(&directory)).await?;
    let written = vm.control.put("/snapshot/create", ask, SAVE_LIMIT).await;
    // Firecracker makes the guest forget its connections, whether or not the snapshot succeeds.
    vm.channel.reset();
    written.map_err(|source| SnapshotError::Vmm { step: "save the VM", source })?;
    let (directory, draft) = (vm.directory().to_owned(), draft.to_owned());
    on_thread("move the files that Firecracker saved", move || {
        let mut names = [Firecracker::STATE, SPARSE].into_iter();
        names.try_for_each(|name| jail::take(&directory, name, &draft.join(name)))
    })
    .await
}

/// Removes the files that Firecracker wrote for a snapshot.
fn remove_unfinished(directory: &Path) -> io::Result<()> {
    [Firecracker::STATE, SPARSE].into_iter().try_for_each(|name| jail::expel(directory, name))
}

/// Records that the dirty pages are unknown, before Firecracker resets its list of them. Returns
/// the machine as it was before.
fn forget_memory(record: &Record) -> io::Result<Machine> {
    let mut known = record.lock();
    let before = known.machine.clone();
    // The VM has run since it was restored: no snapshot based on another memory file can be
    // restored again.
    remove_other_memory(record.directory(), before.memory_file())?;
    let machine = Machine { memory: None, is_unsaved: false, ..before.clone() };
    record.write(&mut known, machine)?;
    Ok(before)
}

/// Converts the memory that Firecracker wrote to the snapshot's format, and bases the VM, which
/// runs on, on a memory file that was made.
pub(crate) fn settle_memory(saved: &mut Saved, unfinished: &Unfinished<'_>) -> io::Result<()> {
    let Unfinished { draft, disks, record, .. } = *unfinished;
    let sparse = draft.join(SPARSE);
    check_memory(&sparse, &saved.machine)?;
    let base = saved.machine.memory.take();
    let is_diff = saved.kind == MemoryKind::Diff && base.is_some();
    let whole_bytes = if is_diff { None } else { Some(memory::dig_holes(&sparse)?) };
    if saved.kind == MemoryKind::Diff && disks == Disks::InPlace {
        let (bytes, hash) = memory::list_pages(&sparse, &draft.join(PAGES))?;
        saved.machine.memory = base;
        saved.memory = SavedMemory::Diff { hash: hash.to_string() };
        saved.memory_bytes = bytes;
        return Ok(());
    }
    let name = new_name("memory-", ".img")?;
    let file = draft.join(&name);
    saved.memory_bytes = match (whole_bytes, base) {
        (None, Some(base)) => {
            let bytes = memory::with_diff(&record.directory().join(base), &sparse, &file)?;
            fs::remove_file(&sparse)?;
            bytes
        }
        (whole, _) => {
            fs::rename(&sparse, &file)?;
            whole.unwrap_or_default()
        }
    };
    if disks == Disks::Frozen {
        File::open(&file)?.sync_all()?;
        stand_on(&name, unfinished)?;
    }
    saved.machine.memory = Some(name);
    Ok(())
}

/// Checks that Firecracker wrote exactly the guest's memory: the file takes space on the host's
/// disk.
fn check_memory(sparse: &Path, machine: &Machine) -> io::Result<()> {
    let (memory, bytes) = (machine.memory_bytes(), fs::metadata(sparse)?.len());
    if bytes == memory {
        return Ok(());
    }
    Err(io::Error::other(format!("the saved memory has {bytes} bytes instead of {memory}")))
}

/// Makes `name` the base of the VM, which continues: its dirty pages are relative to this file
/// from now on.
fn stand_on(name: &str, unfinished: &Unfinished<'_>) -> io::Result<()> {
    let Unfinished { draft, record, capture, .. } = *unfinished;
    let mut known = record.lock();
    if known.captures != capture {
        return Ok(());
    }
    share(&draft.join(name), record.directory(), name)?;
    let machine = Machine { memory: Some(name.to_owned()), ..known.machine.clone() };
    record.write(&mut known, machine)?;
    // The VM maps its previous memory file, so the file's content exists for as long as the VM
    // runs.
    remove_other_memory(record.directory(), name)
}
