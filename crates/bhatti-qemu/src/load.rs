//! Loads a snapshot into a QEMU that waits for it.

use std::io;
use std::time::Duration;

use bhatti_engine::{Disks, RestoreError, RestoreSpec, VmmError};
use bhatti_host::memory::MappedFile;
use bhatti_vmm::{Manifest, Origin, PAGES, Running, SavedMemory, Vmm, damaged};
use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::Qemu;
use crate::{layers, pages};

/// Number of status queries during a load that are sent without a pause, and the pause between
/// later ones.
const QUICK_LOOKS: u32 = 20;
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// Shares the snapshot's memory file, unless it is the VM's own.
pub(crate) fn restore_memory(spec: &RestoreSpec, saved: &Manifest) -> Result<String, RestoreError> {
    let memory = saved.machine.memory_file();
    if spec.disks == Disks::Frozen || matches!(saved.memory, SavedMemory::Full { .. }) {
        let shared = layers::share(&spec.snapshot.join(memory), &spec.directory, memory);
        shared.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => damaged("its memory file is missing"),
            _ => RestoreError::File { step: "share the snapshot's memory", source },
        })?;
    }
    Ok(memory.to_owned())
}

/// See [`Vmm::load`].
pub(crate) async fn load(vm: &Running<Qemu>, from: &Origin<'_>) -> Result<(), RestoreError> {
    if let SavedMemory::Diff { hash } = &from.manifest.memory {
        load_pages(vm, from, hash).await?;
    }
    let failed = |source| RestoreError::Vmm { step: "load the devices", source };
    let uri = format!("file:{}", from.snapshot.join(Qemu::STATE).display());
    let ask = |command, arguments| vm.control.execute(command, arguments, from.limit);
    ask("migrate-incoming", json!({"uri": uri})).await.map_err(failed)?;
    let began = Instant::now();
    for look in 0.. {
        let status = ask("query-status", json!({})).await.map_err(failed)?;
        match status["status"].as_str() {
            Some("inmigrate") => {}
            Some("paused" | "prelaunch" | "postmigrate") => return Ok(()),
            other => return Err(damaged(&format!("QEMU refused its devices ({other:?})"))),
        }
        if began.elapsed() > from.limit {
            break;
        }
        if look >= QUICK_LOOKS {
            sleep(LOOK_PAUSE).await;
        }
    }
    Err(failed(VmmError::Silent { limit: from.limit }))
}

/// Loads the diff's pages into the guest's memory. This precedes the devices, which read the
/// guest's memory when they are loaded.
async fn load_pages(vm: &Running<Qemu>, from: &Origin<'_>, hash: &str) -> Result<(), RestoreError> {
    let base = vm.directory().join(vm.record.machine().memory_file());
    let (pid, file) = (vm.process.id().pid, from.snapshot.join(PAGES));
    let loaded = spawn_blocking(move || {
        let mapped = MappedFile::open(pid, &base)?;
        pages::load_diff(&mapped, &file)
    });
    let loaded = loaded.await.map_err(io::Error::other).and_then(|loaded| loaded);
    let found = loaded.map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData
        | io::ErrorKind::UnexpectedEof
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::NotFound => damaged(&format!("its memory is unreadable: {source}")),
        _ => RestoreError::File { step: "load the memory", source },
    })?;
    if found.to_string() == *hash { Ok(()) } else { Err(damaged("its memory pages were altered")) }
}
