//! A VM: the QEMU process and the connections to it.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::{BootError, VmSpec, VmmError};
use bhatti_host::process::{Detached, Followed, Streams};
use bhatti_host::socket;
use bhatti_types::{DiskMib, SandboxId};
use bhatti_vmm::{
    Console, cgroup, create_log, create_private, log_tail, remove_other_memory, user_of, volumes,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tracing::warn;

use crate::channel::{self, QemuChannel, RECONNECT_LIMIT};
use crate::command_line::{self, Handed};
use crate::qmp::{self, COMMAND_LIMIT, Qmp};
use crate::record::{Machine, Record};
use crate::{Setup, confine, files, overlay};

/// The guest's console.
const CONSOLE: &str = "console.sock";
const LOG: &str = "vmm.log";

/// One malloc arena for all of QEMU's threads: more arenas only hold more unused memory.
const ENVIRONMENT: [(&str, &str); 1] = [("MALLOC_ARENA_MAX", "1")];

/// A VM that is running or paused.
pub(crate) struct QemuVm {
    pub(crate) directory: PathBuf,
    pub(crate) process: Followed,
    pub(crate) qmp: Arc<Qmp>,
    /// The machine that QEMU runs.
    pub(crate) machine: Mutex<Machine>,
    /// What saved VMs of this engine depend on.
    pub(crate) depends_on: String,
    pub(crate) channel: Arc<QemuChannel>,
    pub(crate) console: Console,
}

/// Boots a VM. If that fails, created files and processes stay.
pub(crate) async fn boot(
    spec: &VmSpec,
    setup: &Setup,
    tsc_khz: Option<u64>,
) -> Result<QemuVm, BootError> {
    let machine = prepare(spec).map_err(|(step, source)| BootError::Prepare { step, source })?;
    if !spec.directory.join(&machine.disk).exists() {
        return Err(BootError::NoDisk);
    }
    let arguments = command_line::boot_arguments(spec, tsc_khz);
    let beginning = Beginning { arguments, files: &[&spec.kernel, &spec.initramfs] };
    let process = start(setup, spec.id, &spec.directory, &machine, spec.tap.as_deref(), beginning)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => BootError::NotInstalled { program: setup.program.clone() },
            _ => BootError::Prepare { step: "start QEMU", source },
        })?;
    let vm =
        QemuVm::attach(process, &spec.directory, machine, Qmp::new(), setup.depends_on.clone())
            .map_err(|source| BootError::Prepare { step: "connect to the VM's console", source })?;
    vm.wait_for_agent(spec.boot_limit).await?;
    Ok(vm)
}

/// Creates the files of a VM to boot.
fn prepare(spec: &VmSpec) -> Result<Machine, (&'static str, io::Error)> {
    let directory = &spec.directory;
    create_private(directory).map_err(|source| ("create the VM's directory", source))?;
    let kept = spec.keep_disk.then(|| Record::read(directory));
    let make_disk = || {
        if let Some(record) = kept {
            return Ok(record?.machine.disk);
        }
        let base = spec.root_base.file_name().and_then(|name| name.to_str());
        let base = base.ok_or(io::ErrorKind::InvalidFilename)?;
        files::share(&spec.root_base, directory, base)?;
        let disk = files::new_layer_name()?;
        let bytes = spec.disk.map_or(0, DiskMib::bytes);
        overlay::create_sized(&directory.join(&disk), base, bytes).map_err(io::Error::other)?;
        Ok(disk)
    };
    let disk = make_disk().map_err(|source| ("create the root disk", source))?;
    let memory = remove_other_memory(directory, "")
        .and_then(|()| files::create_empty_memory(directory, spec.memory))
        .map_err(|source| ("create the memory's file", source))?;
    Ok(Machine {
        cpus: spec.cpus.get(),
        memory_mib: spec.memory.get(),
        memory,
        disk,
        disk_bytes: spec.disk.map_or(0, DiskMib::bytes),
        has_network: spec.tap.is_some(),
        volumes: volumes(&spec.volumes),
    })
}

/// What a QEMU process starts from: boot files or a snapshot.
pub(crate) struct Beginning<'a> {
    /// Arguments that select it.
    pub(crate) arguments: Vec<String>,
    /// Files that QEMU reads for it.
    pub(crate) files: &'a [&'a Path],
}

/// Starts QEMU in `directory` and records its process.
pub(crate) fn start(
    setup: &Setup,
    id: SandboxId,
    directory: &Path,
    machine: &Machine,
    tap: Option<&str>,
    beginning: Beginning<'_>,
) -> io::Result<Followed> {
    let listen = |name| {
        // Remove the socket of an earlier VM.
        match fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        socket::listen_in(directory, name)
    };
    let inherited: [UnixListener; 3] =
        [listen(channel::SOCKET)?, listen(CONSOLE)?, listen(qmp::SOCKET)?];
    let [agent, console, qmp] = inherited.each_ref().map(AsFd::as_fd);
    // Change the error's kind: `NotFound` means that QEMU's program is missing.
    let no_tap = |error| io::Error::other(format!("failed to create the tap: {error}"));
    let tap = tap.map(bhatti_host::tap::create).transpose().map_err(no_tap)?;
    let handed = Handed { agent, console, qmp, tap: tap.as_ref().map(AsFd::as_fd) };
    let mut all =
        command_line::machine_arguments(setup.accelerator, id, machine, directory, &handed);
    all.extend(beginning.arguments);
    let log = create_log(&directory.join(LOG))?;
    let user = confine::user(setup, user_of(id));
    confine::give_to(user.map_or(0, |user| user.id), directory, machine)?;
    let mut confinement = confine::confinement(setup, directory, machine, beginning.files)?;
    confinement = confinement.with_files_up_to(confine::file_bytes(directory, machine)?);
    if let Some(user) = user {
        confinement = confinement.as_user(user);
    }
    let detached = Detached {
        program: setup.program.as_os_str(),
        arguments: &all,
        directory: Path::new("/"),
        environment: &ENVIRONMENT,
        inherited: &handed.all(),
        streams: Streams { output: &log, errors: &log },
        confinement: Some(confinement),
    };
    let process = detached.spawn()?;
    let name = bhatti_vmm::vm_name(id);
    let memory_mib = machine.memory_mib + command_line::TRANSLATED_MIB;
    if let Err(error) = cgroup::enter(setup.groups, &name, memory_mib, process.id().pid) {
        // Without the group, only QEMU itself bounds the memory that admission counts.
        warn!(sandbox = %id, %error, "Failed to put QEMU into a control group: its memory is not limited");
    }
    Record::new(process.id(), machine.clone()).write(directory)?;
    Ok(process)
}

impl QemuVm {
    /// Attaches to the VM of `process`. Does not contact the agent: a paused or busy guest is
    /// alive, too.
    pub(crate) fn attach(
        process: Followed,
        directory: &Path,
        machine: Machine,
        qmp: Arc<Qmp>,
        depends_on: String,
    ) -> io::Result<Self> {
        Ok(Self {
            directory: directory.to_owned(),
            process,
            qmp,
            machine: Mutex::new(machine),
            depends_on,
            channel: Arc::new(QemuChannel::new(directory)),
            console: connect_console(directory)?,
        })
    }

    async fn wait_for_agent(&self, limit: Duration) -> Result<(), BootError> {
        tokio::select! {
            connected = timeout(limit, self.channel.connect()) => match connected {
                Ok(Ok(())) => return Ok(()),
                // The channel broke because QEMU ended; the other branch would have completed a
                // moment later.
                Ok(Err(_)) if timeout(RECONNECT_LIMIT, self.process.ended()).await.is_ok() => {}
                Ok(Err(source)) => return Err(BootError::Prepare { step: "reach the guest agent", source }),
                Err(_) => return Err(BootError::TimedOut { limit, console: self.last_words().await }),
            },
            () = self.process.ended() => {}
        }
        Err(BootError::Ended { console: self.last_words().await })
    }

    /// Returns the end of the guest's console. QEMU's own output names files of this host, and so
    /// goes only to the daemon's log.
    async fn last_words(&self) -> String {
        report_log(&self.directory);
        self.console.complete().await;
        self.console.tail()
    }

    /// Whether this VMM was started for a snapshot and has not loaded it.
    pub(crate) async fn waits_for_state(&self) -> bool {
        let status = self.ask("query-status", json!({})).await;
        status.is_ok_and(|status| status["status"] == "inmigrate")
    }

    /// Records the machine's new state.
    pub(crate) fn record(&self, machine: Machine) -> io::Result<()> {
        Record::new(self.process.id(), machine.clone()).write(&self.directory)?;
        *self.machine.lock() = machine;
        Ok(())
    }

    pub(crate) async fn ask(&self, command: &str, arguments: Value) -> Result<Value, VmmError> {
        self.qmp.execute(&self.directory, command, arguments, COMMAND_LIMIT).await
    }
}

fn connect_console(directory: &Path) -> io::Result<Console> {
    let stream = socket::try_connect_in(directory, CONSOLE)?;
    Ok(Console::read(UnixStream::from_std(stream)?))
}

/// Logs QEMU's own output.
pub(crate) fn report_log(directory: &Path) {
    let log = log_tail(&directory.join(LOG));
    if !log.trim().is_empty() {
        tracing::warn!(%log, "QEMU wrote to its log");
    }
}
