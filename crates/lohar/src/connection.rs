//! A connection to the host over any transport, split into halves that detect whether the host is
//! still connected.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bhatti_proto::mux::AcceptedStream;
use bhatti_proto::{FrameReader, FrameWriter};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::AddressFamily;
use rustix::net::sockopt::socket_domain;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long the agent drains the input of a host after a refusal.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// A byte stream from the host.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Unpin + 'static {
    /// Whether the host has closed the whole connection, not only its sending direction.
    fn host_is_gone(&self) -> bool;
}

impl Transport for AcceptedStream {
    fn host_is_gone(&self) -> bool {
        self.get_ref().is_closed()
    }
}

impl Transport for UnixStream {
    fn host_is_gone(&self) -> bool {
        // If the host closes one direction of a Firecracker vsock, both end. The kernel reports
        // RDHUP then, but no hang-up.
        let is_vsock = socket_domain(self) == Ok(AddressFamily::VSOCK);
        let looked_for = if is_vsock { PollFlags::RDHUP } else { PollFlags::empty() };
        let mut fds = [PollFd::new(self, looked_for)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // If poll fails, the host counts as gone.
        !matches!(poll(&mut fds, Some(&now)), Ok(0))
    }
}

/// One of the two halves of a connection.
#[derive(Debug)]
pub(crate) struct Half<T>(Rc<RefCell<T>>);

/// Frames from the host.
pub(crate) type HostReader<T> = FrameReader<Half<T>>;
/// Frames to the host.
pub(crate) type HostWriter<T> = FrameWriter<Half<T>>;

/// Splits a connection.
pub(crate) fn split<T: Transport>(transport: T) -> (Half<T>, Half<T>) {
    let shared = Rc::new(RefCell::new(transport));
    (Half(Rc::clone(&shared)), Half(shared))
}

impl<T: Transport> Half<T> {
    /// Another handle of the connection.
    pub(crate) fn another(&self) -> Self {
        Self(Rc::clone(&self.0))
    }

    /// Drains the host's remaining input until the host has read the agent's last bytes and
    /// closes the connection. If a socket is closed with unread input, the kernel resets the
    /// connection, and the host loses the bytes that it has not read yet.
    pub(crate) async fn drain(mut self) {
        let mut ignored = [0; 4096];
        let drain = async { while matches!(self.read(&mut ignored).await, Ok(1..)) {} };
        // A host that keeps sending is cut off.
        drop(timeout(DRAIN_LIMIT, drain).await);
    }

    /// See [`Transport::host_is_gone`].
    pub(crate) fn host_is_gone(&self) -> bool {
        self.0.borrow().host_is_gone()
    }
}

impl<T: Transport> AsyncRead for Half<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buf)
    }
}

impl<T: Transport> AsyncWrite for Half<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}
