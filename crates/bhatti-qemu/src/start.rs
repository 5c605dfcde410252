//! Starts QEMU and connects to it.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use bhatti_host::process::{Detached, Followed, Streams};
use bhatti_host::socket;
use bhatti_vmm::{
    Connections, Console, LOG, Launch, Source, Vmm, cgroup, create_log, user_of, vm_name,
};
use tokio::net::UnixStream;

use crate::Qemu;
use crate::channel::{self, QemuChannel};
use crate::command_line::{self, InheritedFiles};
use crate::confine;
use crate::qmp::{self, Qmp};

/// The guest's console.
const CONSOLE: &str = "console.sock";

/// One malloc arena for all of QEMU's threads: more arenas only hold more unused memory.
const ENVIRONMENT: [(&str, &str); 1] = [("MALLOC_ARENA_MAX", "1")];

/// See [`Vmm::start`].
pub(crate) fn start(qemu: &Qemu, launch: &Launch<'_>) -> io::Result<Followed> {
    let Launch { id, directory, machine, .. } = *launch;
    let inherited: [UnixListener; 3] = [
        listen(directory, channel::SOCKET)?,
        listen(directory, CONSOLE)?,
        listen(directory, qmp::SOCKET)?,
    ];
    let [agent, console, qmp] = inherited.each_ref().map(AsFd::as_fd);
    // Change the error's kind: `NotFound` means that QEMU's program is missing.
    let no_tap = |error| io::Error::other(format!("failed to create the tap: {error}"));
    let tap = launch.tap.map(bhatti_host::tap::create).transpose().map_err(no_tap)?;
    let handed = InheritedFiles { agent, console, qmp, tap: tap.as_ref().map(AsFd::as_fd) };
    let mut all = command_line::machine_arguments(qemu.accelerator, launch, &handed);
    let state;
    let loaded: &[&Path] = match launch.source {
        Source::Boot(spec) => {
            all.extend(command_line::boot_arguments(spec, qemu.tsc_khz()));
            &[&spec.kernel, &spec.initramfs]
        }
        Source::Snapshot(snapshot) => {
            all.extend(command_line::restore_arguments());
            state = snapshot.join(Qemu::STATE);
            &[&state]
        }
    };
    let log = create_log(&directory.join(LOG))?;
    let user = confine::user(qemu, user_of(id));
    let owner = user.map_or(0, |user| user.id);
    confine::give_to(owner, directory, machine).map_err(io::Error::other)?;
    let confinement = confine::confinement(qemu, launch, loaded, user).map_err(io::Error::other)?;
    let detached = Detached {
        program: qemu.program.as_os_str(),
        arguments: &all,
        directory: Path::new("/"),
        environment: &ENVIRONMENT,
        inherited: &handed.all(),
        streams: Streams { output: &log, errors: &log },
        confinement: Some(confinement),
    };
    let process = detached.spawn()?;
    let memory_mib = machine.memory_mib + command_line::TRANSLATED_MIB;
    if let Err(error) = cgroup::enter(qemu.groups, &vm_name(id), memory_mib, process.id().pid) {
        // Without the group, only QEMU itself bounds the memory that admission counts.
        tracing::warn!(sandbox = %id, %error, "Failed to put QEMU into a control group: its memory is not limited");
    }
    Ok(process)
}

/// Listens on a socket for QEMU, in place of the socket of an earlier VM.
fn listen(directory: &Path, name: &str) -> io::Result<UnixListener> {
    match fs::remove_file(directory.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    socket::listen_in(directory, name)
}

/// See [`Vmm::connect`].
pub(crate) fn connect(directory: &Path) -> io::Result<Connections<Qemu>> {
    let console = socket::try_connect_in(directory, CONSOLE)?;
    Ok(Connections {
        control: Qmp::new(directory),
        channel: Arc::new(QemuChannel::new(directory)),
        console: Console::read(UnixStream::from_std(console)?),
    })
}
