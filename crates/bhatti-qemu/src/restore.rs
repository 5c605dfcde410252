//! Restores VMs from snapshots.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{Disks, RestoreError, RestoreSpec, Staged, Vm};
use bhatti_host::memory::MappedFile;
use bhatti_host::process::Followed;
use bhatti_vmm::{
    Generation, check_volumes, create_private, damaged, remove_other_memory, same, volumes,
};
use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::manifest::{DEVICES, Manifest, Memory, PAGES};
use crate::qmp::Qmp;
use crate::record::Machine;
use crate::vm::{self, Beginning, QemuVm, report_log};
use crate::{Setup, command_line, files, overlay};

/// Number of status queries during a load that are sent without a pause, and the pause between
/// later ones.
const QUICK_LOOKS: u32 = 20;
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// A QEMU that waits for its state.
pub(crate) struct Waiting {
    directory: PathBuf,
    snapshot: PathBuf,
    manifest: Manifest,
    machine: Machine,
    process: Followed,
    qmp: Arc<Qmp>,
    depends_on: String,
    limit: Duration,
}

/// See [`Engine::stage`](bhatti_engine::Engine::stage).
pub(crate) async fn stage(spec: &RestoreSpec, setup: &Setup) -> Result<Waiting, RestoreError> {
    let failed = |step| move |source| RestoreError::File { step, source };
    let manifest = Manifest::read(&spec.snapshot)?;
    same("machine", &manifest.vmm_machine, &setup.depends_on)?;
    let card = |is_there: bool| if is_there { "present" } else { "absent" };
    let has_network = manifest.machine.has_network;
    same("network card", card(has_network), card(spec.tap.is_some()))?;
    let places = |number: usize| number.to_string();
    let saved = manifest.machine.volumes.len();
    same("number of volume slots", &places(saved), &places(spec.volumes.len()))?;
    let mut machine = prepare(spec, &manifest)?;
    machine.volumes = volumes(&spec.volumes);
    let devices = spec.snapshot.join(DEVICES);
    let beginning = Beginning { arguments: command_line::restore_arguments(), files: &[&devices] };
    let process =
        vm::start(setup, spec.id, &spec.directory, &machine, spec.tap.as_deref(), beginning)
            .map_err(failed("start QEMU"))?;
    let waiting = Waiting {
        directory: spec.directory.clone(),
        snapshot: spec.snapshot.clone(),
        manifest,
        machine,
        process,
        qmp: Qmp::new(),
        depends_on: setup.depends_on.clone(),
        limit: spec.limit,
    };
    match waiting.check_version().await {
        Ok(()) => Ok(waiting),
        Err(error) => Err(waiting.give_up(error).await),
    }
}

/// Prepares the files that the VM depends on.
fn prepare(spec: &RestoreSpec, manifest: &Manifest) -> Result<Machine, RestoreError> {
    let (from, to) = (&spec.snapshot, &spec.directory);
    let mut machine = manifest.machine.clone();
    let missing = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => damaged("a required file is missing"),
        _ => RestoreError::File { step: "share the snapshot's files", source },
    };
    match (spec.disks, manifest.disk_generation) {
        (Disks::InPlace, Some(generation)) => {
            let now = Generation::of(&to.join(&machine.disk)).map_err(missing)?;
            if now != generation {
                return Err(RestoreError::Stale);
            }
            overlay::chain(to, &machine.disk).map_err(missing)?;
            check_volumes(&spec.volumes, &manifest.volume_generations)?;
            if matches!(manifest.memory, Memory::Full { .. }) {
                files::share(&from.join(&machine.memory), to, &machine.memory).map_err(missing)?;
            }
        }
        (Disks::Frozen, None) => {
            create_private(to).map_err(|source| RestoreError::File {
                step: "create the VM's directory",
                source,
            })?;
            files::share_layers(from, &machine.disk, to).map_err(missing)?;
            files::share(&from.join(&machine.memory), to, &machine.memory).map_err(missing)?;
            let new_layer = || {
                let layer = files::new_layer_name()?;
                overlay::create(&to.join(&layer), &machine.disk).map_err(io::Error::other)?;
                Ok(layer)
            };
            machine.disk = new_layer()
                .map_err(|source| RestoreError::File { step: "create the VM's disk", source })?;
        }
        (Disks::InPlace, None) => return Err(damaged("its disks are frozen, not in place")),
        (Disks::Frozen, Some(_)) => return Err(damaged("its disks are in place, not frozen")),
    }
    let size = fs::metadata(to.join(&machine.memory)).map_err(missing)?.len();
    if size != u64::from(machine.memory_mib) << 20 {
        return Err(damaged("its memory file has the wrong size"));
    }
    Ok(machine)
}

impl Waiting {
    async fn check_version(&self) -> Result<(), RestoreError> {
        let version = self.qmp.version(&self.directory).await;
        let version =
            version.map_err(|source| RestoreError::Vmm { step: "report its version", source })?;
        same("QEMU", &self.manifest.vmm_version, &version)
    }

    /// Ends the process and returns `error`.
    async fn give_up(self, error: RestoreError) -> RestoreError {
        bhatti_vmm::end(&self.process).await;
        report_log(&self.directory);
        error
    }

    async fn load_state(&self) -> Result<(), RestoreError> {
        self.load_memory().await?;
        let state = self.snapshot.join(DEVICES);
        let gone = |_| damaged("its device state is missing");
        let is_as_long = fs::metadata(&state).map_err(gone)?.len() == self.manifest.devices_bytes;
        if !is_as_long
            || blake3::hash(&fs::read(&state).map_err(gone)?).to_string()
                != self.manifest.devices_hash
        {
            return Err(damaged("its device state was altered"));
        }
        let failed = |source| RestoreError::Vmm { step: "load the devices", source };
        let uri = format!("file:{}", state.display());
        self.ask("migrate-incoming", json!({"uri": uri})).await.map_err(failed)?;
        let began = Instant::now();
        for look in 0.. {
            let status = self.ask("query-status", json!({})).await.map_err(failed)?;
            match status["status"].as_str() {
                Some("inmigrate") => {}
                Some("paused" | "prelaunch" | "postmigrate") => return Ok(()),
                other => return Err(damaged(&format!("QEMU refused its devices ({other:?})"))),
            }
            if began.elapsed() > self.limit {
                break;
            }
            if look >= QUICK_LOOKS {
                sleep(LOOK_PAUSE).await;
            }
        }
        Err(failed(bhatti_engine::VmmError::Silent { limit: self.limit }))
    }

    /// Loads the diff's pages into the guest's memory. This precedes the devices, which read the
    /// guest's memory when they are loaded.
    async fn load_memory(&self) -> Result<(), RestoreError> {
        let Memory::Diff { hash } = &self.manifest.memory else { return Ok(()) };
        let (pid, base) = (self.process.id().pid, self.directory.join(&self.machine.memory));
        let file = self.snapshot.join(PAGES);
        let loaded = spawn_blocking(move || {
            let mapped = MappedFile::open(pid, &base)?;
            crate::pages::load_diff(&mapped, &file)
        });
        let loaded = loaded.await.map_err(io::Error::other).and_then(|loaded| loaded);
        let found = loaded.map_err(|source| match source.kind() {
            io::ErrorKind::InvalidData
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::NotFound => damaged(&format!("its memory is unreadable: {source}")),
            _ => RestoreError::File { step: "load the memory", source },
        })?;
        if found.to_string() == *hash {
            Ok(())
        } else {
            Err(damaged("its memory pages were altered"))
        }
    }

    async fn ask(
        &self,
        command: &str,
        arguments: serde_json::Value,
    ) -> Result<serde_json::Value, bhatti_engine::VmmError> {
        self.qmp.execute(&self.directory, command, arguments, self.limit).await
    }
}

#[async_trait]
impl Staged for Waiting {
    async fn load(self: Box<Self>) -> Result<Arc<dyn Vm>, RestoreError> {
        if let Err(error) = self.load_state().await {
            return Err(self.give_up(error).await);
        }
        let file = |step| move |source| RestoreError::File { step, source };
        if let Err(source) = remove_other_memory(&self.directory, &self.machine.memory) {
            return Err(self.give_up(file("remove unused memory files")(source)).await);
        }
        let id = self.process.id();
        let vm =
            QemuVm::attach(self.process, &self.directory, self.machine, self.qmp, self.depends_on);
        match vm {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(source) => {
                bhatti_vmm::end_by_id(id).await;
                Err(file("connect to the VM's console")(source))
            }
        }
    }
}
