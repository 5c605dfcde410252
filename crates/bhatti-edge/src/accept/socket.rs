//! A connection's socket, and a view of it that reports when the peer has gone.
//!
//! A task that relays bytes to a slow receiver does not read from the sender meanwhile, so it
//! would not notice that the sender has gone: the end of the stream lies behind unread bytes. The
//! kernel reports the end all the same.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::sleep;

/// Time limit for passing on the bytes that a peer sent before it closed its side.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// The same limit for a peer that has gone and can receive nothing more. The bytes that it sent
/// are still in the socket.
const GONE_LIMIT: Duration = Duration::from_secs(5);

/// A socket that a [`PeerSocket`] can watch.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Stream {
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_read_ready(cx),
            Self::Unix(stream) => stream.poll_read_ready(cx),
        }
    }

    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_write_ready(cx),
            Self::Unix(stream) => stream.poll_write_ready(cx),
        }
    }

    fn try_read(&self, buffer: &mut ReadBuf<'_>) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_read_buf(buffer),
            Self::Unix(stream) => stream.try_read_buf(buffer),
        }
    }

    fn try_write(&self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write_vectored(bytes),
            Self::Unix(stream) => stream.try_write_vectored(bytes),
        }
    }
}

/// An accepted connection.
#[derive(Debug)]
pub struct Connection(Arc<Stream>);

impl Connection {
    pub(crate) fn new(stream: Stream) -> Self {
        Self(Arc::new(stream))
    }

    /// Returns a view of the peer, which does not keep the connection open.
    pub(crate) fn peer(&self) -> PeerSocket {
        PeerSocket(Arc::downgrade(&self.0))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(&*self.0, Shutdown::Write).map_err(Into::into))
    }
}

/// The peer of a connection, stored as an extension of its requests.
#[derive(Clone, Debug)]
pub struct PeerSocket(Weak<Stream>);

/// State of a peer, as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Open,
    /// The peer sends nothing more, but may still read.
    Closed,
    /// The peer has gone.
    Gone,
    /// The connection is closed on the daemon's side, too.
    Over,
}

impl PeerSocket {
    /// Resolves five seconds after the peer has gone, or thirty seconds after the peer has
    /// closed its side. Resolves at once if the daemon has closed the connection, and never if
    /// the connection cannot be watched.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn abandoned(&self) {
        match self.wait_for_end().await {
            Ok(Side::Over) => {}
            Ok(Side::Gone) => sleep(GONE_LIMIT).await,
            Ok(_) => sleep(DRAIN_LIMIT).await,
            Err(_) => std::future::pending().await,
        }
    }

    async fn wait_for_end(&self) -> io::Result<Side> {
        // Watch a duplicate of the descriptor: the connection's own readiness belongs to its
        // reader.
        let descriptor: OwnedFd = match self.0.upgrade() {
            Some(stream) => stream.as_fd().try_clone_to_owned()?,
            None => return Ok(Side::Over),
        };
        let watched = bhatti_host::socket::watch(descriptor, Interest::READABLE)?;
        loop {
            let mut ready = watched.readable().await?;
            match side(watched.get_ref())? {
                Side::Open => ready.clear_ready(),
                ended => return Ok(ended),
            }
        }
    }
}

fn side(socket: &OwnedFd) -> io::Result<Side> {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    let seen = fds[0].revents();
    Ok(if seen.intersects(PollFlags::HUP | PollFlags::ERR) {
        Side::Gone
    } else if seen.contains(PollFlags::RDHUP) {
        Side::Closed
    } else {
        Side::Open
    })
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::set_socket_linger;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::{Instant, timeout};

    use super::*;

    async fn connected() -> (TcpStream, Connection) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (peer, Connection::new(Stream::Tcp(listener.accept().await.unwrap().0)))
    }

    #[tokio::test(start_paused = true)]
    async fn reset_is_noticed_behind_unread_bytes() {
        let (mut peer, connection) = connected().await;
        let socket = connection.peer();
        peer.write_all(&[0; 1000]).await.unwrap();
        assert!(timeout(Duration::from_millis(20), socket.abandoned()).await.is_err());

        set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
        drop(peer);

        timeout(DRAIN_LIMIT, socket.abandoned()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_sent_before_the_peer_left_can_still_be_read() {
        let (mut peer, ours) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(Stream::Unix(ours));
        let socket = connection.peer();
        // The peer leaves without reading this output.
        connection.write_all(b"output").await.unwrap();
        peer.write_all(b"input").await.unwrap();
        drop(peer);

        let began = Instant::now();
        socket.abandoned().await;
        assert_eq!(began.elapsed().as_secs(), GONE_LIMIT.as_secs());
        let mut read = [0; 5];
        connection.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"input");
    }

    #[tokio::test(start_paused = true)]
    async fn half_closed_connection_gets_the_drain_limit() {
        let (peer, connection) = connected().await;
        let socket = connection.peer();
        drop(peer);

        let began = Instant::now();
        socket.abandoned().await;

        assert!(began.elapsed() >= DRAIN_LIMIT);
    }

    #[tokio::test]
    async fn abandoned_resolves_for_a_dropped_connection() {
        let (_peer, connection) = connected().await;
        let socket = connection.peer();
        drop(connection);

        socket.abandoned().await;
    }
}
