//! Starts Firecracker in its jail, and boots a guest.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bhatti_engine::{VmSpec, VmmError};
use bhatti_host::blocking;
use bhatti_host::process::{Detached, Followed, Streams};
use bhatti_vmm::{Connections, Console, LOG, Launch, Running, Source, VsockChannel, create_log};
use tokio::net::unix::pipe;

use crate::api::{self, Api, CALL_LIMIT};
use crate::jail::{self, Jail, Use};
use crate::machine::{self, INITRAMFS, KERNEL, VSOCK};
use crate::{Firecracker, START_LIMIT};

/// The guest's console: a pipe. Firecracker drops output that does not fit into it. A hostile
/// guest could fill a file.
const CONSOLE: &str = "console.fifo";

/// See [`Vmm::start`](bhatti_vmm::Vmm::start). The earlier jail was removed.
pub(crate) fn start(firecracker: &Firecracker, launch: &Launch<'_>) -> io::Result<Followed> {
    let directory = launch.directory;
    // Change the errors' kind: `NotFound` means that Firecracker's program is missing.
    let jail = prepare(firecracker, launch).map_err(io::Error::other)?;
    let output = create_log(&directory.join(CONSOLE)).map_err(io::Error::other)?;
    // Messages that name files of this host must not go to the console, whose end the sandbox's
    // owner can see.
    let errors = create_log(&directory.join(LOG)).map_err(io::Error::other)?;
    jail.admit(&directory.join(LOG), LOG, Use::Own).map_err(io::Error::other)?;
    let arguments = ["--api-sock", api::SOCKET, "--log-path", LOG, "--level", "Warn"];
    let (program, arguments) = jail.command(firecracker, launch, &arguments);
    Detached {
        program: program.as_os_str(),
        arguments: &arguments,
        directory: &jail::root(directory),
        environment: &[],
        inherited: &[],
        streams: Streams { output: &output, errors: &errors },
        confinement: None,
    }
    .spawn()
}

/// Makes the jail, with the files that the VM needs to start.
fn prepare(firecracker: &Firecracker, launch: &Launch<'_>) -> io::Result<Jail> {
    let directory = launch.directory;
    let jail = Jail::make(firecracker, launch)?;
    jail.admit(&directory.join(&launch.machine.disk), machine::DISK, Use::Own)?;
    jail.place_volumes(&launch.machine.volumes)?;
    if let Some(memory) = &launch.machine.memory {
        jail.admit(&directory.join(memory), memory, Use::Shared)?;
    }
    if let Source::Boot(spec) = launch.source {
        jail.admit(&spec.kernel, KERNEL, Use::Shared)?;
        jail.admit(&spec.initramfs, INITRAMFS, Use::Shared)?;
    }
    Ok(jail)
}

/// See [`Vmm::connect`](bhatti_vmm::Vmm::connect).
pub(crate) fn connect(directory: &Path) -> io::Result<Connections<Firecracker>> {
    let console = pipe::OpenOptions::new().open_receiver(directory.join(CONSOLE))?;
    Ok(Connections {
        control: Api::new(&jail::root(directory)),
        channel: Arc::new(VsockChannel::new(jail::root(directory), VSOCK)),
        console: Console::read(console),
    })
}

/// Configures a started Firecracker and boots its guest.
pub(crate) async fn boot_guest(vm: &Running<Firecracker>, spec: &VmSpec) -> Result<(), VmmError> {
    vm.control.listening(CALL_LIMIT).await?;
    for (resource, body) in machine::boot_requests(spec) {
        vm.control.put(&resource, &body, START_LIMIT).await?;
    }
    // Firecracker has read the boot files, and no longer needs their names.
    for name in [KERNEL, INITRAMFS] {
        blocking(|| jail::expel(vm.directory(), name))?;
    }
    Ok(())
}
