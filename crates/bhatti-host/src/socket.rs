//! Unix sockets in a directory with a path of any length, and detection of vanished peers.
//!
//! A socket's address holds 107 bytes of path. An address that starts at an open descriptor of
//! the directory (`/proc/self/fd/N/name`) works for any directory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

fn short_path(directory: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

/// First and longest pause between attempts to connect to a listener whose backlog is full.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Idle time before the first keepalive probe, interval between probes, and number of unanswered
/// probes after which the connection ends.
const KEEP_ALIVE_AFTER: Duration = Duration::from_secs(60);
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEP_ALIVE_TIMES: u32 = 4;

/// Enables keepalive, so that the kernel notices when a peer has vanished without closing the
/// connection.
///
/// # Errors
///
/// Returns the error of setting the options.
pub fn keep_alive(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEP_ALIVE_AFTER)?;
    sockopt::set_tcp_keepintvl(&socket, KEEP_ALIVE_EVERY)?;
    Ok(sockopt::set_tcp_keepcnt(&socket, KEEP_ALIVE_TIMES)?)
}

/// Registers a descriptor with the runtime.
///
/// # Errors
///
/// Returns an error if the kernel cannot watch the descriptor, or has no room for another one.
///
/// # Panics
///
/// Panics outside of a runtime.
pub fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open file for as long as it lives.
    #[expect(unsafe_code, reason = "the runtime asks for a promise about the descriptor")]
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    watched.map_err(io::Error::from)
}

/// Binds and listens at `directory/name`.
///
/// # Errors
///
/// Returns the error of opening the directory or binding; [`io::ErrorKind::AddrInUse`] if the
/// name is taken.
pub fn listen_in(directory: &Path, name: &str) -> io::Result<UnixListener> {
    let directory = File::open(directory)?;
    UnixListener::bind(short_path(&directory, name))
}

/// Opens the socket `directory/name`; connect to it at `/proc/self/fd/N`. Refuses anything else
/// at this name: a process that may write to the directory could put a link there that leads
/// elsewhere.
///
/// # Errors
///
/// Returns an error if there is no socket at this name.
pub fn open_in(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let directory = File::open(directory)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = openat(directory, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&socket)?.st_mode) == FileType::Socket {
        Ok(socket)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{name}` is not a socket")))
    }
}

/// Connects to the socket `directory/name`, without following a link. Neither this call nor the
/// stream blocks.
///
/// # Errors
///
/// Returns the error of opening the directory or connecting; [`io::ErrorKind::WouldBlock`] if the
/// listener's backlog is full.
pub fn try_connect_in(directory: &Path, name: &str) -> io::Result<UnixStream> {
    let socket = open_in(directory, name)?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", socket.as_raw_fd()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&stream, &address)?;
    Ok(stream.into())
}

/// Connects to the socket `directory/name`, without following a link. Waits for a listener that
/// accepts no connections. An untrusted process may control the listener, so the caller sets a
/// timeout.
///
/// # Errors
///
/// Returns the error of opening the directory or connecting.
///
/// # Cancel safety
///
/// Cancel safe.
pub async fn connect_in(directory: &Path, name: &str) -> io::Result<tokio::net::UnixStream> {
    let mut pause = FIRST_PAUSE;
    loop {
        match try_connect_in(directory, name) {
            Ok(stream) => return tokio::net::UnixStream::from_std(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        sleep(pause).await;
        pause = LONGEST_PAUSE.min(2 * pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn full_backlog_does_not_block_a_thread() {
        let directory = tempfile::tempdir().unwrap();
        let listener = listen_in(directory.path(), "s.sock").unwrap();
        // The shortest possible backlog.
        rustix::net::listen(&listener, 0).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = try_connect_in(directory.path(), "s.sock") {
            waiting.push(stream);
        }
        let full = try_connect_in(directory.path(), "s.sock").unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);

        let limit = Duration::from_millis(20);
        let connecting = connect_in(directory.path(), "s.sock");
        assert!(tokio::time::timeout(limit, connecting).await.is_err());

        let connecting = async { connect_in(directory.path(), "s.sock").await.unwrap() };
        let accepting = async {
            sleep(limit).await;
            waiting.clear();
            drop(listener.accept().unwrap());
        };
        tokio::join!(connecting, accepting);
    }

    #[test]
    fn socket_works_in_a_directory_with_a_long_path() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d".repeat(200));
        std::fs::create_dir(&directory).unwrap();

        let listener = listen_in(&directory, "s.sock").unwrap();
        let near = try_connect_in(&directory, "s.sock").unwrap();

        assert!(listener.accept().is_ok() && near.peer_addr().is_ok());
        assert!(directory.join("s.sock").exists());
    }
}
