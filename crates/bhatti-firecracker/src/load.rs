//! Loads a snapshot into a Firecracker that waits for it.

use std::fs;
use std::io;

use bhatti_engine::{RestoreError, RestoreSpec};
use bhatti_host::blocking;
use bhatti_vmm::{
    Machine, Manifest, Origin, PAGES, Running, SavedMemory, Vmm, damaged, new_name, same, share,
};
use serde_json::json;

use crate::jail::{self, Jail, Use};
use crate::machine::CARD;
use crate::{Firecracker, memory};

/// Checks that each volume slot is used as it was in the saved VM.
pub(crate) fn check_volumes(saved: &Machine, spec: &RestoreSpec) -> Result<(), RestoreError> {
    let access = |read_only: Option<bool>| match read_only {
        Some(true) => "read-only",
        Some(false) => "writable",
        None => "empty",
    };
    for (before, now) in saved.volumes.iter().zip(&spec.volumes) {
        let before = access(before.as_ref().map(|volume| volume.read_only));
        same("volume", before, access(now.as_ref().map(|volume| volume.read_only)))?;
    }
    Ok(())
}

/// Creates the file that the VM's memory is a private mapping of. Returns its name.
pub(crate) fn restore_memory(spec: &RestoreSpec, saved: &Manifest) -> Result<String, RestoreError> {
    let (from, to) = (&spec.snapshot, &spec.directory);
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => damaged("its memory file is missing"),
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            damaged(&format!("its memory is unreadable: {source}"))
        }
        _ => RestoreError::File { step: "prepare the memory", source },
    };
    let machine = &saved.machine;
    let SavedMemory::Diff { hash } = &saved.memory else {
        let file = machine.memory_file();
        share(&from.join(file), to, file).map_err(unreadable)?;
        return Ok(file.to_owned());
    };
    let name = new_name("memory-", ".img").map_err(unreadable)?;
    let base = machine.memory.as_ref().map(|base| to.join(base));
    let (pages, file) = (from.join(PAGES), to.join(&name));
    let made = memory::with_pages(base.as_deref(), machine.memory_bytes(), &pages, &file);
    let found = made.map_err(unreadable).and_then(|found| {
        let is_it = found.to_string() == *hash;
        is_it.then_some(()).ok_or_else(|| damaged("its memory pages were altered"))
    });
    if found.is_err() {
        // The base stays: another attempt may find an intact diff.
        drop(fs::remove_file(file));
    }
    found.map(|()| name)
}

/// See [`Vmm::load`].
pub(crate) async fn load(vm: &Running<Firecracker>, from: &Origin<'_>) -> Result<(), RestoreError> {
    let file = |step| move |source| RestoreError::File { step, source };
    let state = from.snapshot.join(Firecracker::STATE);
    let jail = Jail::of(&vm.vmm, vm.id, vm.directory());
    blocking(|| jail.admit(&state, Firecracker::STATE, Use::Shared))
        .map_err(file("share the snapshot's state"))?;
    let cards: Vec<_> =
        from.tap.iter().map(|tap| json!({ "iface_id": CARD, "host_dev_name": tap })).collect();
    let memory = vm.record.machine().memory;
    // The guest's monotonic clock continues from its saved value, as after every pause; the agent
    // sets the wall clock.
    let ask = json!({
        "snapshot_path": Firecracker::STATE,
        "mem_backend": { "backend_type": "File", "backend_path": memory },
        "track_dirty_pages": true,
        "resume_vm": false,
        "network_overrides": cards,
    });
    vm.control
        .put("/snapshot/load", &ask, from.limit)
        .await
        .map_err(|source| RestoreError::Vmm { step: "load the snapshot", source })?;
    // Firecracker has loaded both files, and no longer needs their names.
    for name in memory.as_deref().into_iter().chain([Firecracker::STATE]) {
        blocking(|| jail::expel(vm.directory(), name))
            .map_err(file("remove the snapshot's files from the jail"))?;
    }
    Ok(())
}
