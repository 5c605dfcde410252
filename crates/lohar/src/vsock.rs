//! The agent's two ports on vsock, for hypervisors that have it: one connection per operation.

use std::fs::{self, DirEntry};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use bhatti_proto::{CONTROL_PORT, FORWARD_PORT};
use rustix::net::{AddressFamily, SocketFlags, SocketType, listen, socket_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::Agent;
use crate::log;
use crate::serve::{ACCEPT_RETRY, spawn_control, spawn_forward};
use crate::watched::watch;

/// Connections that may wait to be accepted: as many as the kernel allows by default
/// (`net.core.somaxconn`). A further connection is refused, and the host cannot distinguish that
/// from an agent that has ended. Hundreds arrive at once if many commands are started.
const BACKLOG: i32 = 4096;

/// Where the kernel lists the devices of its vsock driver.
const DRIVER: &str = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport";

/// Both ports.
pub(crate) struct Vsock {
    control: Listener,
    forward: Listener,
}

impl Vsock {
    /// Listens, if the hypervisor gave the guest a vsock device.
    pub(crate) fn open() -> io::Result<Option<Self>> {
        if !has_device() {
            return Ok(None);
        }
        let (control, forward) = (Listener::open(CONTROL_PORT)?, Listener::open(FORWARD_PORT)?);
        Ok(Some(Self { control, forward }))
    }

    /// Serves for as long as the guest runs.
    pub(crate) async fn serve(&self, agent: &Rc<Agent>) {
        loop {
            tokio::select! {
                stream = self.control.accept() => spawn_control(agent, stream),
                stream = self.forward.accept() => spawn_forward(agent, stream),
            }
        }
    }
}

fn has_device() -> bool {
    let is_device = |entry: io::Result<DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name().as_encoded_bytes().starts_with(b"virtio"))
    };
    fs::read_dir(DRIVER).is_ok_and(|mut entries| entries.any(is_device))
}

struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    fn open(port: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
        bind(&socket, port)?;
        listen(&socket, BACKLOG)?;
        Ok(Self(watch(socket, Interest::READABLE)?))
    }

    /// Accepts the host's next connection. Refuses the guest's own processes, which could connect
    /// through the kernel's loopback: the agent must serve only the host.
    async fn accept(&self) -> UnixStream {
        loop {
            match self.0.async_io(Interest::READABLE, |socket| accept(socket)).await {
                // The runtime treats every stream socket alike, regardless of its address family.
                Ok((stream, libc::VMADDR_CID_HOST)) => match UnixStream::from_std(stream.into()) {
                    Ok(stream) => return stream,
                    Err(error) => log::line(format_args!("failed to watch a connection: {error}")),
                },
                Ok((_, cid)) => {
                    log::line(format_args!("refused a vsock connection from CID {cid}"));
                }
                Err(error) => {
                    log::line(format_args!("failed to accept a vsock connection: {error}"));
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

fn address(port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: AddressFamily::VSOCK.as_raw(),
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: libc::VMADDR_CID_ANY,
        svm_zero: [0; 4],
    }
}

fn address_length() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or(libc::socklen_t::MAX)
}

fn bind(socket: &OwnedFd, port: u32) -> io::Result<()> {
    let address = address(port);
    // SAFETY: the pointer and the length are those of a live address of the socket's family.
    #[expect(unsafe_code, reason = "no safe wrapper knows addresses of this family")]
    let result =
        unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), address_length()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Accepts a connection. Returns it with the CID of its peer.
fn accept(socket: impl AsFd) -> io::Result<(OwnedFd, u32)> {
    let (mut peer, mut length) = (address(0), address_length());
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes no more than `length` bytes, the size of the address. A
    // descriptor that it returns has no other owner.
    #[expect(unsafe_code, reason = "no safe wrapper knows addresses of this family")]
    let accepted = unsafe {
        let descriptor = libc::accept4(
            socket.as_fd().as_raw_fd(),
            (&raw mut peer).cast(),
            &raw mut length,
            flags,
        );
        (descriptor >= 0).then(|| OwnedFd::from_raw_fd(descriptor))
    };
    accepted.map(|stream| (stream, peer.svm_cid)).ok_or_else(io::Error::last_os_error)
}
