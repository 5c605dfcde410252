//! Restores VMs from snapshots.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{Disks, RestoreError, RestoreSpec, Staged, Vm, VmmError};
use bhatti_host::blocking;
use bhatti_types::DiskMib;
use tokio::task::spawn_blocking;

use crate::files::{STATE_BYTES_MAX, create_private, read_at_most, remove_other_memory};
use crate::generation::{Generation, check_volumes, damaged, same};
use crate::machine::{Machine, volumes};
use crate::manifest::{Manifest, SavedMemory};
use crate::process::end;
use crate::vm::start;
use crate::vmm::{Launch, Origin, Running, Source, Vmm, report_log};

/// A VMM that waits for its snapshot.
pub(crate) struct StagedVm<V: Vmm> {
    vm: Running<V>,
    snapshot: PathBuf,
    manifest: Manifest,
    tap: Option<String>,
    limit: Duration,
}

/// See [`Engine::stage`](bhatti_engine::Engine::stage).
pub(crate) async fn stage<V: Vmm>(
    vmm: &Arc<V>,
    spec: &RestoreSpec,
) -> Result<StagedVm<V>, RestoreError> {
    let failed = |step| move |source| RestoreError::File { step, source };
    vmm.clean_up(spec.id, &spec.directory)
        .await
        .map_err(failed("remove what is left of an earlier VM"))?;
    let (own_vmm, own_spec) = (Arc::clone(vmm), spec.clone());
    let started = spawn_blocking(move || prepare_and_start(&own_vmm, &own_spec)).await;
    let (vm, manifest) = started.map_err(io::Error::other).map_err(failed("start the VMM"))??;
    let staged = StagedVm {
        vm,
        snapshot: spec.snapshot.clone(),
        manifest,
        tap: spec.tap.clone(),
        limit: spec.limit,
    };
    match staged.check_version().await {
        Ok(()) => Ok(staged),
        Err(error) => Err(staged.give_up(error).await),
    }
}

fn prepare_and_start<V: Vmm>(
    vmm: &Arc<V>,
    spec: &RestoreSpec,
) -> Result<(Running<V>, Manifest), RestoreError> {
    let manifest = Manifest::read(&spec.snapshot, V::EARLIER_FORMAT..=V::FORMAT)?;
    check(&**vmm, spec, &manifest)?;
    let started = start_prepared(vmm, spec, &manifest);
    if started.is_err() && spec.disks == Disks::InPlace {
        // A memory file that was made for this attempt. The next attempt removes it, too.
        drop(remove_other_memory(&spec.directory, base_of(&manifest)));
    }
    Ok((started?, manifest))
}

/// The memory file that a snapshot needs besides its own files: the base of a diff.
fn base_of(manifest: &Manifest) -> &str {
    match manifest.memory {
        SavedMemory::Diff { .. } => manifest.machine.memory_file(),
        SavedMemory::Full { .. } => "",
    }
}

fn start_prepared<V: Vmm>(
    vmm: &Arc<V>,
    spec: &RestoreSpec,
    manifest: &Manifest,
) -> Result<Running<V>, RestoreError> {
    let machine = prepare(&**vmm, spec, manifest)?;
    let launch = Launch {
        id: spec.id,
        directory: &spec.directory,
        machine: &machine,
        tap: spec.tap.as_deref(),
        source: Source::Snapshot(&spec.snapshot),
    };
    start(vmm, &launch).map_err(|source| RestoreError::File { step: "start the VMM", source })
}

/// Checks that the machine to restore is the same as the saved one.
fn check<V: Vmm>(vmm: &V, spec: &RestoreSpec, manifest: &Manifest) -> Result<(), RestoreError> {
    same("machine", &manifest.vmm_machine, &vmm.capabilities().machine)?;
    let saved = &manifest.machine;
    let card = |is_there: bool| if is_there { "present" } else { "absent" };
    same("network card", card(saved.has_network), card(spec.tap.is_some()))?;
    let slots = |number: usize| number.to_string();
    same("number of volume slots", &slots(saved.volumes.len()), &slots(spec.volumes.len()))?;
    vmm.check(saved, spec)
}

/// Prepares the files that the VM depends on.
fn prepare<V: Vmm>(
    vmm: &V,
    spec: &RestoreSpec,
    manifest: &Manifest,
) -> Result<Machine, RestoreError> {
    let missing = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => damaged("a required file is missing"),
        _ => RestoreError::File { step: "share the snapshot's files", source },
    };
    let saved = &manifest.machine;
    let disk = match (spec.disks, manifest.disk_generation) {
        (Disks::InPlace, Some(generation)) => {
            let now = Generation::of(&spec.directory.join(&saved.disk)).map_err(missing)?;
            if now != generation {
                return Err(RestoreError::Stale);
            }
            vmm.check_disk(&spec.directory, &saved.disk).map_err(missing)?;
            check_volumes(&spec.volumes, &manifest.volume_generations)?;
            // Remove the memory file of an earlier attempt.
            remove_other_memory(&spec.directory, base_of(manifest)).map_err(missing)?;
            saved.disk.clone()
        }
        (Disks::Frozen, None) => {
            create_private(&spec.directory).map_err(|source| RestoreError::File {
                step: "create the VM's directory",
                source,
            })?;
            let disk = match &spec.root {
                None => vmm.fork_disk(&spec.snapshot, &saved.disk, &spec.directory),
                Some(root) => vmm.new_disk(&spec.directory, root),
            };
            disk.map_err(missing)?
        }
        (Disks::InPlace, None) => return Err(damaged("its disks are frozen, not in place")),
        (Disks::Frozen, Some(_)) => return Err(damaged("its disks are in place, not frozen")),
    };
    let memory = vmm.restore_memory(spec, manifest)?;
    let size = fs::metadata(spec.directory.join(&memory)).map_err(missing)?.len();
    if size != saved.memory_bytes() {
        return Err(damaged("its memory file has the wrong size"));
    }
    let volumes = volumes(&spec.volumes);
    let replaced = spec.root.as_ref().map(|root| root.disk.map_or(0, DiskMib::bytes));
    let disk_bytes = replaced.unwrap_or(saved.disk_bytes);
    let memory = Some(memory);
    Ok(Machine { memory, is_unsaved: false, disk, disk_bytes, volumes, ..saved.clone() })
}

impl<V: Vmm> StagedVm<V> {
    async fn check_version(&self) -> Result<(), RestoreError> {
        let version = tokio::select! {
            version = self.vm.vmm.version(&self.vm) => version,
            () = self.vm.process.ended() => Err(VmmError::Unreachable(io::ErrorKind::BrokenPipe.into())),
        };
        let version =
            version.map_err(|source| RestoreError::Vmm { step: "report its version", source })?;
        same(V::NAME, &self.manifest.vmm_version, &version)
    }

    async fn load_snapshot(&self) -> Result<(), RestoreError> {
        let (state, hash) = (self.snapshot.join(V::STATE), self.manifest.state_hash.clone());
        let checked = spawn_blocking(move || match read_at_most(&state, STATE_BYTES_MAX) {
            Ok(content) if blake3::hash(&content).to_string() == hash => Ok(()),
            Ok(_) => Err(damaged("its device state was altered")),
            Err(error) => Err(damaged(&format!("its device state is unreadable: {error}"))),
        });
        checked.await.map_err(|error| RestoreError::File {
            step: "read the devices' state",
            source: io::Error::other(error),
        })??;
        let origin = Origin {
            snapshot: &self.snapshot,
            manifest: &self.manifest,
            tap: self.tap.as_deref(),
            limit: self.limit,
        };
        tokio::select! {
            loaded = self.vm.vmm.load(&self.vm, &origin) => loaded,
            () = self.vm.process.ended() => Err(RestoreError::Vmm {
                step: "load the snapshot",
                source: VmmError::Unreachable(io::ErrorKind::BrokenPipe.into()),
            }),
        }
    }

    /// Ends the process, and restores the directory to its earlier state. Returns `error`.
    async fn give_up(self, error: RestoreError) -> RestoreError {
        let Self { vm, manifest, .. } = self;
        end(&vm.process).await;
        blocking(|| report_log::<V>(vm.directory()));
        let directory = vm.directory().to_owned();
        let removed = spawn_blocking(move || remove_other_memory(&directory, base_of(&manifest)));
        if let Err(error) = removed.await.map_err(io::Error::other).and_then(|removed| removed) {
            tracing::warn!(%error, "Failed to remove an unused memory file");
        }
        if let Err(error) = vm.vmm.clean_up(vm.id, vm.directory()).await {
            tracing::warn!(%error, "Failed to clean up after a VM that was not restored");
        }
        error
    }
}

#[async_trait]
impl<V: Vmm> Staged for StagedVm<V> {
    async fn load(self: Box<Self>) -> Result<Arc<dyn Vm>, RestoreError> {
        match self.load_snapshot().await {
            Ok(()) => Ok(Arc::new(self.vm)),
            Err(error) => Err(self.give_up(error).await),
        }
    }
}
