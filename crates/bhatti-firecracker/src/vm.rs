//! A VM: the Firecracker process and the connections to it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bhatti_engine::{AgentChannel, BootError, VmSpec, VmmError};
use bhatti_host::disk;
use bhatti_host::process::{Detached, Followed, Streams};
use bhatti_proto::CONTROL_PORT;
use bhatti_types::SandboxId;
use bhatti_vmm::{
    Console, VsockChannel, create_log, create_private, log_tail, remove_other_memory, volumes,
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep, timeout};

use crate::Setup;
use crate::api::{self, Api, CALL_LIMIT, State};
use crate::jail::{self, Jail, Use};
use crate::machine::{self, DISK, INITRAMFS, KERNEL, Machine, Record, VSOCK};

/// The guest's console: a pipe. Firecracker drops output that does not fit into it. A hostile
/// guest could fill a file.
const CONSOLE: &str = "console.fifo";
const LOG: &str = "vmm.log";

/// How often to try to reach the agent of a booting guest.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// How long Firecracker may take to start the guest, and to pause or resume its vCPUs.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A VM that is running or paused.
pub(crate) struct FirecrackerVm {
    pub(crate) directory: PathBuf,
    pub(crate) process: Followed,
    pub(crate) api: Api,
    pub(crate) state: Arc<Mutex<Known>>,
    /// What saved VMs of this engine depend on.
    pub(crate) depends_on: String,
    pub(crate) channel: Arc<VsockChannel>,
    pub(crate) console: Console,
}

/// The daemon's knowledge of the machine.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) machine: Machine,
    /// Number of captures so far. Each capture makes earlier knowledge of the memory obsolete.
    pub(crate) captures: AtomicU64,
}

/// Copies the image, and extends the copy to the size of the disk.
fn create_disk(spec: &VmSpec) -> io::Result<()> {
    let path = spec.directory.join(DISK);
    disk::copy(&spec.root_base, &path)?;
    let Some(size) = spec.disk else { return Ok(()) };
    let file = File::options().write(true).open(&path)?;
    if size.bytes() > file.metadata()?.len() {
        file.set_len(size.bytes())?;
    }
    Ok(())
}

/// Boots a VM. If that fails, created files and processes stay.
pub(crate) async fn boot(spec: &VmSpec, setup: &Setup) -> Result<FirecrackerVm, BootError> {
    let failed = |step| move |source| BootError::Prepare { step, source };
    let directory = &spec.directory;
    create_private(directory).map_err(failed("create the VM's directory"))?;
    if !spec.keep_disk {
        create_disk(spec).map_err(failed("create the root disk"))?;
    } else if !directory.join(DISK).exists() {
        return Err(BootError::NoDisk);
    }
    remove_other_memory(directory, "").map_err(failed("remove an earlier memory file"))?;
    let machine = Machine {
        cpus: spec.cpus.get(),
        memory_mib: spec.memory.get(),
        memory: None,
        is_unsaved: true,
        has_network: spec.tap.is_some(),
        volumes: volumes(&spec.volumes),
    };
    let place = Place { id: spec.id, directory, tap: spec.tap.as_deref() };
    let jail =
        prepare(setup, &place, &machine).await.map_err(failed("prepare Firecracker's jail"))?;
    for (file, name) in [(&spec.kernel, KERNEL), (&spec.initramfs, INITRAMFS)] {
        jail.admit(file, name, Use::Shared).map_err(failed("share the boot files"))?;
    }
    let process = start(setup, &place, &jail, &machine).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => BootError::NotInstalled { program: setup.program.clone() },
        _ => BootError::Prepare { step: "start Firecracker", source },
    })?;
    let vm = FirecrackerVm::attach(process, directory, machine, setup.depends_on.clone())
        .map_err(failed("open the VM's console"))?;
    let refused = |error| BootError::Prepare {
        step: "configure the virtual machine",
        source: io::Error::other(error),
    };
    vm.until_it_ends(vm.api.listening(CALL_LIMIT)).await?.map_err(refused)?;
    for (resource, body) in machine::boot_requests(spec) {
        vm.until_it_ends(vm.api.put(&resource, &body, START_LIMIT)).await?.map_err(refused)?;
    }
    for name in [KERNEL, INITRAMFS] {
        jail::expel(directory, name).map_err(failed("remove the boot files from the jail"))?;
    }
    vm.wait_for_agent(spec.boot_limit).await?;
    Ok(vm)
}

/// The sandbox, directory and tap of a VM.
pub(crate) struct Place<'a> {
    pub(crate) id: SandboxId,
    pub(crate) directory: &'a Path,
    pub(crate) tap: Option<&'a str>,
}

/// Makes a jail for Firecracker, with the disks and the memory file of `machine`.
pub(crate) async fn prepare(
    setup: &Setup,
    place: &Place<'_>,
    machine: &Machine,
) -> io::Result<Jail> {
    let jail = Jail::make(setup, place.id, place.directory, place.tap).await?;
    jail.admit(&place.directory.join(DISK), DISK, Use::Own)?;
    jail.place_volumes(&machine.volumes)?;
    if let Some(memory) = &machine.memory {
        jail.admit(&place.directory.join(memory), memory, Use::Shared)?;
    }
    Ok(jail)
}

/// Starts Firecracker in its jail and records its process.
pub(crate) fn start(
    setup: &Setup,
    place: &Place<'_>,
    jail: &Jail,
    machine: &Machine,
) -> io::Result<Followed> {
    let directory = place.directory;
    let console = directory.join(CONSOLE);
    let output = create_log(&console)?;
    // Messages that name files of this host must not go to the console, whose end the sandbox's
    // owner can see.
    let complaints = create_log(&directory.join(LOG))?;
    jail.admit(&directory.join(LOG), LOG, Use::Own)?;
    let arguments = ["--api-sock", api::SOCKET, "--log-path", LOG, "--level", "Warn"];
    let (program, arguments) = jail.command(setup, place.id, machine, &arguments);
    let streams = Streams { output: &output, errors: &complaints };
    let root = jail::root(directory);
    let detached = Detached {
        program: program.as_os_str(),
        arguments: &arguments,
        directory: &root,
        environment: &[],
        inherited: &[],
        streams,
        confinement: None,
    };
    let process = detached.spawn()?;
    Record::new(process.id(), machine.clone()).write(directory)?;
    Ok(process)
}

impl FirecrackerVm {
    /// Attaches to the VM of `process`. Does not contact the agent: a paused or busy guest is
    /// alive, too.
    pub(crate) fn attach(
        process: Followed,
        directory: &Path,
        machine: Machine,
        depends_on: String,
    ) -> io::Result<Self> {
        let console = pipe::OpenOptions::new().open_receiver(directory.join(CONSOLE))?;
        Ok(Self {
            directory: directory.to_owned(),
            process,
            api: Api::new(&jail::root(directory)),
            state: Arc::new(Mutex::new(Known { machine, captures: AtomicU64::new(0) })),
            depends_on,
            channel: Arc::new(VsockChannel::new(jail::root(directory), VSOCK)),
            console: Console::read(console),
        })
    }

    /// Waits for `act`. Returns an error if Firecracker ends first.
    async fn until_it_ends<T>(&self, act: impl Future<Output = T>) -> Result<T, BootError> {
        tokio::select! {
            done = act => Ok(done),
            () = self.process.ended() => Err(BootError::Ended { console: self.last_words().await }),
        }
    }

    async fn wait_for_agent(&self, limit: Duration) -> Result<(), BootError> {
        let began = Instant::now();
        loop {
            let left = limit.saturating_sub(began.elapsed());
            let opened = timeout(left, self.channel.open(CONTROL_PORT));
            match self.until_it_ends(opened).await? {
                Ok(Ok(_stream)) => return Ok(()),
                // The agent does not listen in the guest yet.
                Ok(Err(_)) if !left.is_zero() => self.until_it_ends(sleep(LOOK_PAUSE)).await?,
                _ => return Err(BootError::TimedOut { limit, console: self.last_words().await }),
            }
        }
    }

    /// Returns the end of the guest's console. Firecracker's own output names files of this host,
    /// and so goes only to the daemon's log.
    async fn last_words(&self) -> String {
        report_log(&self.directory);
        self.console.complete().await;
        self.console.tail()
    }

    /// Records the machine's new state.
    pub(crate) fn record(&self, machine: &Machine) -> io::Result<()> {
        Record::new(self.process.id(), machine.clone()).write(&self.directory)
    }

    pub(crate) async fn change_state(&self, from: State, to: &str) -> Result<(), VmmError> {
        if self.api.instance().await?.state != from {
            return Ok(());
        }
        self.api.patch("/vm", &json!({ "state": to }), START_LIMIT).await
    }
}

/// Logs Firecracker's own output.
pub(crate) fn report_log(directory: &Path) {
    let log = log_tail(&directory.join(LOG));
    if !log.trim().is_empty() {
        tracing::warn!(log, "Firecracker wrote to its log");
    }
}
