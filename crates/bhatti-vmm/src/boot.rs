//! Boots VMs.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::{AgentChannel, BootError, VmSpec};
use bhatti_proto::{AWAITING_ROOT, CONTROL_PORT};
use bhatti_types::DiskMib;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use crate::files::{create_private, remove_other_memory};
use crate::machine::{Machine, volumes};
use crate::vm::start;
use crate::vmm::{Launch, Running, Source, Vmm};

/// How often to try to reach the agent of a booting guest.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// How long a process may take to disappear once its connections have broken.
const END_LIMIT: Duration = Duration::from_millis(500);

/// See [`Engine::boot`](bhatti_engine::Engine::boot). If the boot fails, created files and
/// processes stay.
pub(crate) async fn boot<V: Vmm>(vmm: &Arc<V>, spec: &VmSpec) -> Result<Running<V>, BootError> {
    let failed = |step| move |source| BootError::Prepare { step, source };
    vmm.clean_up(spec.id, &spec.directory)
        .await
        .map_err(failed("remove what is left of an earlier VM"))?;
    let (own_vmm, own_spec) = (Arc::clone(vmm), spec.clone());
    let started = spawn_blocking(move || prepare_and_start(&own_vmm, &own_spec)).await;
    let vm = started.map_err(io::Error::other).map_err(failed("start the VMM"))??;
    let up = async {
        vmm.configure(&vm, spec).await.map_err(|error| BootError::Prepare {
            step: "configure the virtual machine",
            source: io::Error::other(error),
        })?;
        if spec.awaits_root {
            return awaits_root(&vm, spec.boot_limit).await;
        }
        answers(&vm, spec.boot_limit).await
    };
    let up = tokio::select! {
        up = up => up,
        () = vm.process.ended() => Err(BootError::Ended { console: vm.last_words().await }),
    };
    match up {
        // The connection broke because the VMM ended.
        Err(BootError::Prepare { .. }) if timeout(END_LIMIT, vm.process.ended()).await.is_ok() => {
            Err(BootError::Ended { console: vm.last_words().await })
        }
        up => up.map(|()| vm),
    }
}

fn prepare_and_start<V: Vmm>(vmm: &Arc<V>, spec: &VmSpec) -> Result<Running<V>, BootError> {
    let machine =
        prepare(&**vmm, spec).map_err(|(step, source)| BootError::Prepare { step, source })?;
    if !spec.directory.join(&machine.disk).exists() {
        return Err(BootError::NoDisk);
    }
    let launch = Launch {
        id: spec.id,
        directory: &spec.directory,
        machine: &machine,
        tap: spec.tap.as_deref(),
        source: Source::Boot(spec),
    };
    let vm = start(vmm, &launch).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => BootError::NotInstalled { program: program(&**vmm) },
        _ => BootError::Prepare { step: "start the VMM", source },
    })?;
    // Until here, a saved memory could be restored if the boot failed.
    remove_other_memory(&spec.directory, machine.memory_file())
        .map_err(|source| BootError::Prepare { step: "remove an earlier memory file", source })?;
    Ok(vm)
}

fn program<V: Vmm>(vmm: &V) -> PathBuf {
    vmm.programs().pop().unwrap_or_default()
}

/// Creates the files of a VM to boot.
fn prepare<V: Vmm>(vmm: &V, spec: &VmSpec) -> Result<Machine, (&'static str, io::Error)> {
    let directory = &spec.directory;
    create_private(directory).map_err(|source| ("create the VM's directory", source))?;
    let disk = vmm.boot_disk(spec).map_err(|source| ("create the root disk", source))?;
    let memory = vmm.boot_memory(spec);
    Ok(Machine {
        cpus: spec.cpus.get(),
        memory_mib: spec.memory.get(),
        memory: memory.map_err(|source| ("create the memory's file", source))?,
        is_unsaved: true,
        disk,
        disk_bytes: spec.disk.map_or(0, DiskMib::bytes),
        has_network: spec.tap.is_some(),
        volumes: volumes(&spec.volumes),
    })
}

/// Waits until the guest waits for its root disk.
async fn awaits_root<V: Vmm>(vm: &Running<V>, limit: Duration) -> Result<(), BootError> {
    let waits = async {
        while !vm.console.tail().contains(AWAITING_ROOT) {
            sleep(LOOK_PAUSE).await;
        }
    };
    match timeout(limit, waits).await {
        Ok(()) => Ok(()),
        Err(_) => Err(BootError::TimedOut { limit, console: vm.last_words().await }),
    }
}

/// Waits until the guest's agent answers.
async fn answers<V: Vmm>(vm: &Running<V>, limit: Duration) -> Result<(), BootError> {
    let began = Instant::now();
    loop {
        let left = limit.saturating_sub(began.elapsed());
        match timeout(left, vm.channel.open(CONTROL_PORT)).await {
            Ok(Ok(_stream)) => return Ok(()),
            // The agent does not listen yet.
            Ok(Err(_)) if !left.is_zero() => sleep(LOOK_PAUSE).await,
            _ => return Err(BootError::TimedOut { limit, console: vm.last_words().await }),
        }
    }
}
