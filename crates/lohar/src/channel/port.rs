//! A virtio-serial port, watched by edge.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, ready};

use rustix::event::{Timespec, epoll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::watched::watch;

/// The name that the host gave the port.
const PORT_NAME: &str = "agent";

/// Where the kernel lists the ports.
const PORTS: &str = "/sys/class/virtio-ports";

/// An open port.
pub(super) struct Port {
    file: OwnedFd,
    changes: AsyncFd<OwnedFd>,
    read_waits: bool,
    write_waits: bool,
}

impl Port {
    /// Opens the agent's port.
    pub(super) fn open() -> io::Result<Self> {
        let file = open(find()?, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        let changes = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let all = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::HUP
            | epoll::EventFlags::ET;
        epoll::add(&changes, &file, epoll::EventData::new_u64(0), all)?;
        let changes = watch(changes, Interest::READABLE)?;
        Ok(Self { file, changes, read_waits: false, write_waits: false })
    }

    /// Reads the available bytes. Returns 0 if the host is not connected.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::read(&self.file, &mut *buffer) {
                Err(Errno::AGAIN) => {
                    self.read_waits = true;
                    ready!(self.poll_change(cx))?;
                }
                Err(Errno::INTR) => {}
                result => return Poll::Ready(result.map_err(io::Error::from)),
            }
        }
    }

    /// Writes as many bytes as fit. Waits for room, and for the host.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(&self.file, buffer) {
                Err(Errno::AGAIN) => {
                    self.write_waits = true;
                    ready!(self.poll_change(cx))?;
                }
                Err(Errno::INTR) => {}
                result => return Poll::Ready(result.map_err(io::Error::from)),
            }
        }
    }

    /// Waits until anything about the port has changed.
    pub(super) fn poll_change(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.changes.poll_read_ready(cx))?;
            let mut events = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }];
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            if epoll::wait(self.changes.get_ref(), &mut events[..], Some(&at_once))? > 0 {
                // One edge covers both directions, and one task serves both: wake it again, so
                // that it checks the other direction, too.
                if self.read_waits && self.write_waits {
                    cx.waker().wake_by_ref();
                }
                (self.read_waits, self.write_waits) = (false, false);
                return Poll::Ready(Ok(()));
            }
            ready.clear_ready();
        }
    }
}

fn find() -> io::Result<PathBuf> {
    for entry in fs::read_dir(PORTS)? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))
            .is_ok_and(|name| name.trim_end() == PORT_NAME)
        {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("no virtio-serial port is named `{PORT_NAME}`"),
    ))
}
