//! Restores VMs from snapshots.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{Disks, RestoreError, RestoreSpec, Staged, Vm, VmmError};
use bhatti_host::disk;
use bhatti_host::process::Followed;
use bhatti_types::SandboxId;
use bhatti_vmm::{
    Generation, STATE_BYTES_MAX, check_volumes, create_private, damaged, new_name, read_at_most,
    remove_other_memory, same, share, volumes,
};
use serde_json::json;
use tokio::task::spawn_blocking;

use crate::Setup;
use crate::api::{Api, CALL_LIMIT};
use crate::jail::{self, Jail, Use};
use crate::machine::{CARD, DISK, Machine, Record};
use crate::manifest::{Manifest, Memory, PAGES, STATE};
use crate::memory;
use crate::vm::{self, FirecrackerVm, Place, report_log};

/// A Firecracker that waits for its state.
pub(crate) struct Waiting {
    id: SandboxId,
    jail: Jail,
    directory: PathBuf,
    snapshot: PathBuf,
    manifest: Manifest,
    machine: Machine,
    tap: Option<String>,
    process: Followed,
    api: Api,
    depends_on: String,
    limit: Duration,
}

/// See [`Engine::stage`](bhatti_engine::Engine::stage).
pub(crate) async fn stage(spec: &RestoreSpec, setup: &Setup) -> Result<Waiting, RestoreError> {
    let failed = |step| move |source| RestoreError::File { step, source };
    let manifest = Manifest::read(&spec.snapshot)?;
    check(spec, &manifest, setup)?;
    let (own_spec, own_manifest) = (spec.clone(), manifest.clone());
    let prepared = spawn_blocking(move || prepare(&own_spec, &own_manifest)).await;
    let machine =
        prepared.map_err(io::Error::other).map_err(failed("prepare the VM's files"))??;
    let place = Place { id: spec.id, directory: &spec.directory, tap: spec.tap.as_deref() };
    let jail =
        vm::prepare(setup, &place, &machine).await.map_err(failed("prepare Firecracker's jail"))?;
    let process = vm::start(setup, &place, &jail, &machine).map_err(failed("start Firecracker"))?;
    let waiting = Waiting {
        id: spec.id,
        jail,
        directory: spec.directory.clone(),
        snapshot: spec.snapshot.clone(),
        manifest,
        machine,
        tap: spec.tap.clone(),
        process,
        api: Api::new(&jail::root(&spec.directory)),
        depends_on: setup.depends_on.clone(),
        limit: spec.limit,
    };
    match waiting.check_version().await {
        Ok(()) => Ok(waiting),
        Err(error) => Err(waiting.give_up(error).await),
    }
}

/// Checks that the machine to restore is the same as the saved one.
fn check(spec: &RestoreSpec, manifest: &Manifest, setup: &Setup) -> Result<(), RestoreError> {
    same("machine", &manifest.vmm_machine, &setup.depends_on)?;
    let card = |is_there: bool| if is_there { "present" } else { "absent" };
    same("network card", card(manifest.machine.has_network), card(spec.tap.is_some()))?;
    let saved = &manifest.machine.volumes;
    same("number of volume slots", &saved.len().to_string(), &spec.volumes.len().to_string())?;
    for (before, now) in saved.iter().zip(&spec.volumes) {
        let access = |read_only: Option<bool>| match read_only {
            Some(true) => "read-only",
            Some(false) => "writable",
            None => "empty",
        };
        let before = access(before.as_ref().map(|volume| volume.read_only));
        same("volume", before, access(now.as_ref().map(|volume| volume.read_only)))?;
    }
    Ok(())
}

/// Prepares the files that the VM depends on.
fn prepare(spec: &RestoreSpec, manifest: &Manifest) -> Result<Machine, RestoreError> {
    let (from, to) = (&spec.snapshot, &spec.directory);
    let missing = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => damaged("a required file is missing"),
        _ => RestoreError::File { step: "share the snapshot's files", source },
    };
    match (spec.disks, manifest.disk_generation) {
        (Disks::InPlace, Some(generation)) => {
            if Generation::of(&to.join(DISK)).map_err(missing)? != generation {
                return Err(RestoreError::Stale);
            }
            check_volumes(&spec.volumes, &manifest.volume_generations)?;
            // Remove the memory file of an earlier attempt.
            let kept = manifest.machine.memory.as_deref().unwrap_or_default();
            remove_other_memory(to, kept).map_err(missing)?;
        }
        (Disks::Frozen, None) => {
            create_private(to).map_err(|source| RestoreError::File {
                step: "create the VM's directory",
                source,
            })?;
            disk::copy(&from.join(DISK), &to.join(DISK)).map_err(missing)?;
        }
        (Disks::InPlace, None) => return Err(damaged("its disks are frozen, not in place")),
        (Disks::Frozen, Some(_)) => return Err(damaged("its disks are in place, not frozen")),
    }
    let memory = prepare_memory(from, to, manifest)?;
    let size = fs::metadata(to.join(&memory)).map_err(missing)?.len();
    if size != u64::from(manifest.machine.memory_mib) << 20 {
        return Err(damaged("its memory file has the wrong size"));
    }
    let volumes = volumes(&spec.volumes);
    Ok(Machine { memory: Some(memory), is_unsaved: false, volumes, ..manifest.machine.clone() })
}

/// Creates the file that the VM's memory is a private mapping of. Returns its name.
fn prepare_memory(from: &Path, to: &Path, manifest: &Manifest) -> Result<String, RestoreError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => damaged("its memory file is missing"),
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            damaged(&format!("its memory is unreadable: {source}"))
        }
        _ => RestoreError::File { step: "prepare the memory", source },
    };
    match &manifest.memory {
        Memory::Whole { file } => {
            share(&from.join(file), to, file).map_err(unreadable)?;
            Ok(file.clone())
        }
        Memory::Diff { hash } => {
            let name = new_name("memory-", ".img").map_err(unreadable)?;
            let base = manifest.machine.memory.as_ref().map(|base| to.join(base));
            let size = u64::from(manifest.machine.memory_mib) << 20;
            let made =
                memory::with_pages(base.as_deref(), size, &from.join(PAGES), &to.join(&name));
            let found = made.map_err(unreadable).and_then(|found| {
                let is_it = found.to_string() == *hash;
                is_it.then_some(()).ok_or_else(|| damaged("its memory pages were altered"))
            });
            if found.is_err() {
                // The base stays: another attempt may find an intact diff.
                drop(fs::remove_file(to.join(&name)));
            }
            found.map(|()| name)
        }
    }
}

impl Waiting {
    async fn check_version(&self) -> Result<(), RestoreError> {
        let ask = async {
            self.api.listening(CALL_LIMIT).await?;
            self.api.instance().await
        };
        let instance = tokio::select! {
            instance = ask => instance,
            () = self.process.ended() => Err(VmmError::Unreachable(io::ErrorKind::BrokenPipe.into())),
        };
        let instance =
            instance.map_err(|source| RestoreError::Vmm { step: "report its version", source })?;
        same("Firecracker", &self.manifest.vmm_version, &instance.vmm_version)
    }

    /// Ends the process, and restores the directory to its earlier state. Returns `error`.
    async fn give_up(self, error: RestoreError) -> RestoreError {
        bhatti_vmm::end(&self.process).await;
        report_log(&self.directory);
        // The VM's earlier memory file is the base of the diff, so it must stay.
        let kept = self.manifest.machine.memory.as_deref().unwrap_or_default();
        if let Err(error) = remove_other_memory(&self.directory, kept) {
            tracing::warn!(%error, "Failed to remove an unused memory file");
        }
        if let Err(error) = jail::clear(self.id, &self.directory).await {
            tracing::warn!(%error, "Failed to remove the jail of a VM that was not restored");
        }
        error
    }

    async fn load_state(&self) -> Result<(), RestoreError> {
        let state = self.snapshot.join(STATE);
        let content = read_at_most(&state, STATE_BYTES_MAX)
            .map_err(|error| damaged(&format!("its device state is unreadable: {error}")))?;
        if blake3::hash(&content).to_string() != self.manifest.state_hash {
            return Err(damaged("its device state was altered"));
        }
        self.jail
            .admit(&state, STATE, Use::Shared)
            .map_err(|source| RestoreError::File { step: "share the snapshot's state", source })?;
        let cards: Vec<_> =
            self.tap.iter().map(|tap| json!({ "iface_id": CARD, "host_dev_name": tap })).collect();
        // The guest's monotonic clock continues from its saved value, as after every pause; the
        // agent sets the wall clock.
        let ask = json!({
            "snapshot_path": STATE,
            "mem_backend": { "backend_type": "File", "backend_path": self.machine.memory },
            "track_dirty_pages": true,
            "resume_vm": false,
            "network_overrides": cards,
        });
        let loaded = tokio::select! {
            loaded = self.api.put("/snapshot/load", &ask, self.limit) => loaded,
            () = self.process.ended() => Err(VmmError::Unreachable(io::ErrorKind::BrokenPipe.into())),
        };
        loaded.map_err(|source| RestoreError::Vmm { step: "load the snapshot", source })?;
        // Firecracker has loaded both files, and no longer needs their names.
        let memory = self.machine.memory.as_deref();
        for name in memory.into_iter().chain([STATE]) {
            jail::expel(&self.directory, name).map_err(|source| RestoreError::File {
                step: "remove the snapshot's files from the jail",
                source,
            })?;
        }
        Ok(())
    }
}

#[async_trait]
impl Staged for Waiting {
    async fn load(self: Box<Self>) -> Result<Arc<dyn Vm>, RestoreError> {
        if let Err(error) = self.load_state().await {
            return Err(self.give_up(error).await);
        }
        let file = |step| move |source| RestoreError::File { step, source };
        let id = self.process.id();
        let record = Record::new(id, self.machine.clone());
        if let Err(source) = record.write(&self.directory) {
            return Err(self.give_up(file("record the VM")(source)).await);
        }
        let vm =
            FirecrackerVm::attach(self.process, &self.directory, self.machine, self.depends_on);
        match vm {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(source) => {
                bhatti_vmm::end_by_id(id).await;
                Err(file("open the VM's console")(source))
            }
        }
    }
}
