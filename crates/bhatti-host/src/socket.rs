//! Unix sockets in a directory, however long its path; and peers that vanish.
//!
//! A socket's address holds 107 bytes of path. Addressed through an open descriptor of its directory (`/proc/self/fd/N/name`) any
//! directory will do.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
use rustix::net::sockopt;

fn short_path(directory: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

/// When a peer that says nothing is asked whether it is there, how often, and how many times in vain.
const KEEP_ALIVE_AFTER: Duration = Duration::from_secs(60);
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEP_ALIVE_TIMES: u32 = 4;

/// Has the kernel notice when a peer has vanished without a word.
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

/// Binds and listens at `directory/name`.
///
/// # Errors
///
/// Returns the error of opening the directory or binding; a name that is taken is [`io::ErrorKind::AddrInUse`].
pub fn listen_in(directory: &Path, name: &str) -> io::Result<UnixListener> {
    let directory = File::open(directory)?;
    UnixListener::bind(short_path(&directory, name))
}

/// Opens the socket `directory/name` to be connected to at `/proc/self/fd/N`, and nothing that is in its place: who may write the directory
/// could put a link there that leads elsewhere.
///
/// # Errors
///
/// Returns an error if there is none.
pub fn open_in(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let directory = File::open(directory)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = openat(directory, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&socket)?.st_mode) == FileType::Socket {
        Ok(socket)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{name}` is no socket")))
    }
}

/// Connects to the socket `directory/name`; a link is none. Blocks only if the listener's backlog is full.
///
/// # Errors
///
/// Returns the error of opening the directory or connecting.
pub fn connect_in(directory: &Path, name: &str) -> io::Result<UnixStream> {
    let socket = open_in(directory, name)?;
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_lives_in_a_directory_of_any_length() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d".repeat(200));
        std::fs::create_dir(&directory).unwrap();

        let listener = listen_in(&directory, "s.sock").unwrap();
        let near = connect_in(&directory, "s.sock").unwrap();

        assert!(listener.accept().is_ok() && near.peer_addr().is_ok());
        assert!(directory.join("s.sock").exists());
    }
}
