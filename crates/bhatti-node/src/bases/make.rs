//! Makes base snapshots.
//!
//! ```text
//!  boot ─► wait for a root disk ─► snapshot, for each shape
//!                                     │ with an image's disk
//!                                     ▼
//!                     mount it ─► agent answers ─► warm-up ─► base snapshot
//! ```
//!
//! Until a guest mounts its root disk, it is the same for all images. So the first part of the boot
//! is snapshotted, too, if the engine can [replace the root disk](Capabilities::replaces_root).
//! Under software emulation, this part takes two thirds of the time.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bhatti_agent::{AgentClient, CallError};
#[cfg(doc)]
use bhatti_engine::Capabilities;
use bhatti_engine::{Disks, MemoryKind, NewRoot, RestoreSpec, SnapshotRequest, Vm, VmSpec};
use bhatti_host::blocking;
use bhatti_proto::{CONTROL_PORT, ExecRequest};
use bhatti_types::{Report, SandboxId, UserId};
use tokio::time::{Duration, Instant, sleep, timeout};
use tracing::{error, info, warn};

use super::{Base, BaseError, MAKING, Recipe, key_of, lock};
use crate::Shared;
use crate::identity::random;
use crate::networks;

/// Time limit of each command of a guest's warm-up run.
const WARM_UP_LIMIT: Duration = Duration::from_secs(30);

/// How often to try to reach the agent of a starting guest.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// The file of an empty root disk, and its size in bytes.
const NO_ROOT: &str = "no-root.img";
const NO_ROOT_BYTES: u64 = 1 << 20;

/// Makes the base snapshot of a recipe. The caller has its turn and its locks.
pub(super) async fn make(
    shared: &Shared,
    owner: UserId,
    recipe: &Recipe,
    key: &str,
) -> Result<(), BaseError> {
    let began = Instant::now();
    let spec = new_spec(shared, recipe)?;
    let _admitted = shared.admit(recipe.memory).await?;
    let vm = start(shared, owner, recipe, &spec).await?;
    let saved = save(vm.as_ref(), &shared.bases.directory.join(key)).await;
    remove(shared, &spec).await;
    saved?;
    let make_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    info!(
        base = key,
        cpus = recipe.cpus.get(),
        memory_mb = recipe.memory.get(),
        make_ms,
        "Made a base snapshot"
    );
    Ok(())
}

fn new_spec(shared: &Shared, recipe: &Recipe) -> Result<VmSpec, BaseError> {
    let id = SandboxId::from_entropy(random()?);
    Ok(VmSpec {
        id,
        hostname: shared.config.base_hostname.clone(),
        cpus: recipe.cpus,
        memory: recipe.memory,
        disk: recipe.disk,
        directory: shared.bases.directory.join(format!("{MAKING}{id}")),
        kernel: recipe.files.kernel.clone(),
        initramfs: recipe.files.initramfs.clone(),
        root_base: Some(recipe.files.root.clone()),
        tap: networks::tap(id, recipe.has_network),
        volumes: vec![None; recipe.slots],
        awaits_root: false,
        is_builder: false,
        boot_limit: shared.config.boot_limit,
    })
}

async fn remove(shared: &Shared, spec: &VmSpec) {
    if let Err(left) = shared.engine.remove(spec.id, &spec.directory).await {
        error!(error = %Report(&left), "Failed to remove the VM from which a base snapshot was made");
    }
}

/// Starts a guest whose agent answers: from a snapshot before its root disk, or by a boot.
async fn start(
    shared: &Shared,
    owner: UserId,
    recipe: &Recipe,
    spec: &VmSpec,
) -> Result<Arc<dyn Vm>, BaseError> {
    if shared.engine.capabilities().replaces_root {
        match start_before_root(shared, owner, recipe, spec).await {
            Ok(vm) => return Ok(vm),
            Err(error) => {
                warn!(error = %Report(&error), "Failed to start a guest from a snapshot before its root disk: booting it");
                remove(shared, spec).await;
            }
        }
    }
    Ok(shared.engine.boot(spec).await?)
}

async fn start_before_root(
    shared: &Shared,
    owner: UserId,
    recipe: &Recipe,
    spec: &VmSpec,
) -> Result<Arc<dyn Vm>, BaseError> {
    let base = before_root(shared, owner, recipe).await?;
    base.note_use();
    let started = start_from(shared, &base.directory, spec).await;
    // Any other error may be the image's fault. Other images need the snapshot.
    if let Err(BaseError::Start(_)) = started {
        shared.bases.discard(&base).await;
    }
    started
}

/// Returns the snapshot of a guest that waits for its root disk. Makes it for `owner` if there is
/// none.
async fn before_root(shared: &Shared, owner: UserId, recipe: &Recipe) -> Result<Base, BaseError> {
    let bases = &shared.bases;
    let key = key_of(&shared.engine.capabilities().machine, recipe, ["", "no root"]);
    let _turn = bases.making.take(key.clone()).await;
    if let Some(base) = blocking(|| bases.existing(&key, recipe)) {
        return Ok(base);
    }
    let _others_turn = lock(&bases.directory, &key).await.map_err(BaseError::Lock)?;
    if let Some(base) = blocking(|| bases.existing(&key, recipe)) {
        return Ok(base);
    }
    let began = Instant::now();
    let no_root = blocking(|| no_root(&bases.directory)).map_err(BaseError::NoRoot)?;
    let own = new_spec(shared, recipe)?;
    let spec = VmSpec { root_base: Some(no_root), disk: None, awaits_root: true, ..own };
    let vm = shared.engine.boot(&spec).await?;
    let saved = capture(vm.as_ref(), &bases.directory.join(&key)).await;
    remove(shared, &spec).await;
    saved?;
    bases.made_for.lock().insert(key.clone(), owner);
    let make_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    info!(base = key, make_ms, "Made a snapshot of a guest before its root disk");
    blocking(|| bases.existing(&key, recipe)).ok_or(BaseError::Interrupted)
}

/// Returns the file of an empty root disk. Makes it if it is missing. It is never shortened: VMs
/// may have links to it.
fn no_root(directory: &Path) -> io::Result<PathBuf> {
    let path = directory.join(NO_ROOT);
    if !fs::metadata(&path).is_ok_and(|file| file.len() == NO_ROOT_BYTES) {
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        file.set_len(NO_ROOT_BYTES)?;
    }
    Ok(path)
}

/// Restores a guest that waits for its root disk with the disk of `spec`, and waits until its agent
/// answers. After an error, files and processes stay.
async fn start_from(
    shared: &Shared,
    snapshot: &Path,
    spec: &VmSpec,
) -> Result<Arc<dyn Vm>, BaseError> {
    let root = spec.root_base.clone().map(|base| NewRoot { base, disk: spec.disk });
    let restored = RestoreSpec {
        id: spec.id,
        directory: spec.directory.clone(),
        snapshot: snapshot.to_owned(),
        disks: Disks::Frozen,
        tap: spec.tap.clone(),
        volumes: spec.volumes.clone(),
        root,
        limit: spec.boot_limit,
    };
    let vm = shared.engine.stage(&restored).await?.load().await?;
    vm.resume().await?;
    let channel = vm.channel();
    let answers = async {
        while channel.open(CONTROL_PORT).await.is_err() {
            sleep(LOOK_PAUSE).await;
        }
    };
    tokio::select! {
        answered = timeout(spec.boot_limit, answers) => {
            answered.map_err(|_| CallError::Silent { limit: spec.boot_limit })?;
        }
        () = vm.ended() => return Err(CallError::Lost.into()),
    }
    Ok(vm)
}

/// Runs a command that the image may lack: an image without a shell is valid.
///
/// # Errors
///
/// Returns an error if the agent does not answer.
pub(crate) async fn run_if_there(
    agent: &AgentClient,
    command: ExecRequest,
) -> Result<(), CallError> {
    match agent.run(command).await {
        Ok(_) | Err(CallError::Agent(_) | CallError::Refused(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

async fn save(vm: &dyn Vm, directory: &Path) -> Result<(), BaseError> {
    let agent = AgentClient::new(vm.channel());
    // Loads what every command needs into the memory of every fork, so that no fork reads it from
    // the disk.
    for argv in [&["true"][..], &["sh", "-c", "ls >/dev/null; cat /dev/null"]] {
        let argv = argv.iter().map(|&argument| argument.to_owned()).collect();
        let first = run_if_there(&agent, ExecRequest { argv, ..ExecRequest::default() });
        let silent = |_| CallError::Silent { limit: WARM_UP_LIMIT };
        timeout(WARM_UP_LIMIT, first).await.map_err(silent)??;
    }
    agent.suspend(true).await?;
    capture(vm, directory).await
}

/// Pauses a guest and saves it.
async fn capture(vm: &dyn Vm, directory: &Path) -> Result<(), BaseError> {
    vm.pause().await?;
    let request = SnapshotRequest {
        directory: directory.to_owned(),
        memory: Some(MemoryKind::Full),
        disks: Disks::Frozen,
        copies: Vec::new(),
    };
    vm.capture(&request).await?.finish().await?;
    Ok(())
}
