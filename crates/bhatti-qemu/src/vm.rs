//! A VM: the QEMU process and the connections to it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, BootError, Vm, VmSpec};
use bhatti_host::process::{Followed, spawn_detached};
use bhatti_host::socket;
use tokio::time::timeout;

use crate::channel::{self, QemuChannel, RECONNECT_LIMIT};
use crate::command_line::{Command, Sockets};
use crate::console::{self, Console};
use crate::overlay;
use crate::record::Record;

const LOG: &str = "vmm.log";
const QMP_SOCKET: &str = "qmp.sock";
const ROOT_DISK: &str = "root.qcow2";

/// The end of QEMU's log that errors show, in bytes.
const LOG_TAIL_BYTES: usize = 4096;

/// A VM that runs.
pub(crate) struct QemuVm {
    directory: PathBuf,
    process: Followed,
    channel: Arc<QemuChannel>,
    console: Console,
}

impl QemuVm {
    /// Boots a VM. What was made stays where it is if that fails.
    pub(crate) async fn boot(spec: &VmSpec, command: &Command<'_>) -> Result<Self, BootError> {
        let vm = Self::start(spec, command)?;
        tokio::select! {
            connected = timeout(spec.boot_limit, vm.channel.connect()) => match connected {
                Ok(Ok(())) => return Ok(vm),
                // The channel breaks because QEMU ends; the other branch would have told so in a moment.
                Ok(Err(_)) if timeout(RECONNECT_LIMIT, vm.process.ended()).await.is_ok() => {}
                Ok(Err(source)) => return Err(BootError::Prepare { step: "reach the guest agent", source }),
                Err(_) => return Err(BootError::TimedOut { limit: spec.boot_limit, console: vm.last_words().await }),
            },
            () = vm.process.ended() => {}
        }
        Err(BootError::Ended { console: vm.last_words().await })
    }

    fn start(spec: &VmSpec, command: &Command<'_>) -> Result<Self, BootError> {
        let directory = &spec.directory;
        let failed = |step| move |source| BootError::Prepare { step, source };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed("create the VM's directory"))?;
        let root_disk = directory.join(ROOT_DISK);
        overlay::create(&root_disk, &spec.root_base)
            .map_err(|error| failed("create the root disk")(io::Error::other(error)))?;
        let listen =
            |name| socket::listen_in(directory, name).map_err(failed("create the VM's sockets"));
        let (agent, console, qmp) =
            (listen(channel::SOCKET)?, listen(console::SOCKET)?, listen(QMP_SOCKET)?);
        let sockets = Sockets { agent: agent.as_fd(), console: console.as_fd(), qmp: qmp.as_fd() };
        let arguments = command.boot_arguments(spec, &root_disk, &sockets);
        let process = spawn(command.program, directory, &arguments, [&agent, &console, &qmp])?;
        Record::new(process.id()).write(directory).map_err(failed("record the VM's process"))?;
        Self::attach(process, directory).map_err(failed("connect to the VM's console"))
    }

    /// Takes up the VM of `process`. Its agent is not asked: a guest that is paused or busy is alive all the same.
    pub(crate) fn attach(process: Followed, directory: &Path) -> io::Result<Self> {
        let console = Console::connect(directory)?;
        let channel = Arc::new(QemuChannel::new(directory));
        Ok(Self { directory: directory.to_owned(), process, channel, console })
    }

    /// What the guest said last. What QEMU itself said names files of this host, and so goes to our log alone.
    async fn last_words(&self) -> String {
        let log = fs::read(self.directory.join(LOG)).unwrap_or_default();
        let log =
            String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_TAIL_BYTES)..]).into_owned();
        if !log.trim().is_empty() {
            tracing::warn!(log, "QEMU complained");
        }
        self.console.complete().await;
        self.console.tail()
    }
}

fn spawn(
    program: &Path,
    directory: &Path,
    arguments: &[String],
    sockets: [&UnixListener; 3],
) -> Result<Followed, BootError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => BootError::NotInstalled { program: program.to_owned() },
        _ => BootError::Prepare { step: "start QEMU", source },
    };
    let log = File::create(directory.join(LOG)).map_err(failed)?;
    let inherited = sockets.map(AsFd::as_fd);
    spawn_detached(program.as_os_str(), arguments, &inherited, &log).map_err(failed)
}

#[async_trait]
impl Vm for QemuVm {
    fn channel(&self) -> Arc<dyn AgentChannel> {
        Arc::clone(&self.channel) as Arc<dyn AgentChannel>
    }

    async fn ended(&self) {
        self.process.ended().await;
    }

    fn console_tail(&self) -> String {
        self.console.tail()
    }
}
