//! Many streams over one connection: yamux, with the host as the side that opens them.
//!
//! A stream begins with its port, as four bytes big-endian ([`CONTROL_PORT`](crate::CONTROL_PORT)
//! or [`FORWARD_PORT`](crate::FORWARD_PORT)). The rest of the stream is the same as a connection
//! to that port. Opening a stream costs no round trip. Streams that the guest opens are reset.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::io::{AsyncRead as FuturesRead, AsyncWrite as FuturesWrite};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

use crate::batch::Batched;

/// Streams that may be open at once on one channel.
pub const STREAMS_MAX: usize = 1024;

/// Further streams that yamux may hold: closed on this side, but not yet on the other.
const CLOSING_STREAMS: usize = 1024;

/// The most bytes that are sent together with the port.
const FIRST_BYTES_MAX: usize = 8 * 1024;

/// The most open requests that wait for the driver.
const OPEN_QUEUE: usize = 64;

fn config() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(STREAMS_MAX + CLOSING_STREAMS);
    config.set_max_connection_receive_window(Some(
        (STREAMS_MAX + CLOSING_STREAMS) * yamux_window_bytes(),
    ));
    config
}

/// The initial window of every yamux stream: section "Flow Control" of the yamux specification.
const fn yamux_window_bytes() -> usize {
    256 * 1024
}

/// A stream could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The channel has ended, and all its streams with it.
    #[error("the agent channel is closed")]
    Closed,
    /// [`STREAMS_MAX`] streams are open.
    #[error("{STREAMS_MAX} operations run in this sandbox already")]
    TooMany,
}

/// Opens streams: the host's handle of a multiplexed channel.
#[derive(Clone, Debug)]
pub struct Opener {
    requests: mpsc::Sender<oneshot::Sender<yamux::Stream>>,
    room: Arc<Semaphore>,
}

impl Opener {
    /// Multiplexes `io`. The second value drives the channel: spawn it. The driver ends when the
    /// connection ends, or when the opener, its clones and all their streams are dropped.
    pub fn new<S>(io: S) -> (Self, impl Future<Output = ()> + Send)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin,
    {
        let (requests, waiting) = mpsc::channel(OPEN_QUEUE);
        let io = Batched::new(io.compat());
        let connection = yamux::Connection::new(io, config(), yamux::Mode::Client);
        (Self { requests, room: Arc::new(Semaphore::new(STREAMS_MAX)) }, drive(connection, waiting))
    }

    /// Whether the channel has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }

    /// Opens a stream to `port`.
    ///
    /// # Errors
    ///
    /// Returns an error if the channel has ended or too many streams are open. Waits while the
    /// guest is far behind in accepting streams: give the call a timeout.
    pub async fn open(&self, port: u32) -> Result<MuxStream, OpenError> {
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(|_| OpenError::TooMany)?;
        let (reply, stream) = oneshot::channel();
        self.requests.send(reply).await.map_err(|_| OpenError::Closed)?;
        Ok(MuxStream {
            stream: stream.await.map_err(|_| OpenError::Closed)?.compat(),
            port: Some(port),
            _keeps_channel: self.requests.clone(),
            _room: room,
        })
    }
}

async fn drive<S>(
    mut connection: yamux::Connection<S>,
    mut requests: mpsc::Receiver<oneshot::Sender<yamux::Stream>>,
) where
    S: FuturesRead + FuturesWrite + Unpin,
{
    let mut request: Option<oneshot::Sender<yamux::Stream>> = None;
    std::future::poll_fn(|cx| {
        loop {
            // Poll the inbound side first: if the connection has ended, no caller may get a
            // stream of it.
            match connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(uninvited))) => {
                    drop(uninvited);
                    continue;
                }
                Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(()),
                Poll::Pending => {}
            }
            if request.is_none() {
                match requests.poll_recv(cx) {
                    Poll::Ready(Some(next)) => request = Some(next),
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
            // The next iteration drives the new stream.
            match connection.poll_new_outbound(cx) {
                Poll::Ready(Ok(stream)) => {
                    // The caller may have given up. Dropping the stream resets it.
                    if let Some(reply) = request.take() {
                        drop(reply.send(stream));
                    }
                }
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

/// A stream that the host opened.
#[derive(Debug)]
pub struct MuxStream {
    stream: Compat<yamux::Stream>,
    /// The port, until it has been sent.
    port: Option<u32>,
    _keeps_channel: mpsc::Sender<oneshot::Sender<yamux::Stream>>,
    _room: OwnedSemaphorePermit,
}

impl MuxStream {
    /// Sends the port, unless it was sent already, together with the first of `bytes`. Returns
    /// how many of `bytes` were sent, or `None` if the port was sent before.
    fn poll_write_port(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<Option<usize>>> {
        let Some(port) = self.port else { return Poll::Ready(Ok(None)) };
        let port = port.to_be_bytes();
        let first = [&port, &bytes[..bytes.len().min(FIRST_BYTES_MAX)]].concat();
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &first))?;
        // The initial window has room for the port, so a shorter write is an error.
        let written = written.checked_sub(port.len()).ok_or(io::ErrorKind::WriteZero)?;
        self.port = None;
        Poll::Ready(Ok(Some(written)))
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_write_port(cx, &[]))?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match ready!(self.poll_write_port(cx, buf))? {
            Some(written) => Poll::Ready(Ok(written)),
            None => Pin::new(&mut self.stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_port(cx, &[]))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_port(cx, &[]))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Accepts streams: the guest's end of a multiplexed channel.
pub struct Acceptor<S> {
    connection: yamux::Connection<Batched<S>>,
}

/// A stream that the guest accepted.
pub type AcceptedStream = Compat<yamux::Stream>;

impl<S: FuturesRead + FuturesWrite + Unpin> Acceptor<S> {
    /// Multiplexes `io`.
    pub fn new(io: S) -> Self {
        let io = Batched::new(io);
        Self { connection: yamux::Connection::new(io, config(), yamux::Mode::Server) }
    }

    /// Accepts the next stream. Returns `None` when the channel has ended. The channel makes
    /// progress only while this future is polled.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn accept(&mut self) -> Option<AcceptedStream> {
        let stream = std::future::poll_fn(|cx| self.connection.poll_next_inbound(cx)).await;
        stream?.ok().map(FuturesAsyncReadCompatExt::compat)
    }
}

/// Reads the port that an accepted stream is for.
///
/// # Errors
///
/// Returns the stream's error, or an EOF error if the stream ended.
pub async fn read_port(stream: &mut AcceptedStream) -> io::Result<u32> {
    stream.read_u32().await
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// Counts the writes to the stream.
    struct CountsWrites(DuplexStream, Arc<AtomicUsize>);

    impl AsyncRead for CountsWrites {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for CountsWrites {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Pin::new(&mut self.0).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn messages_sent_together_are_one_write() {
        let (near, far) = duplex(8192);
        let (asks, answers) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (opener, driver) = Opener::new(CountsWrites(near, Arc::clone(&asks)));
        tokio::spawn(driver);
        let mut acceptor = Acceptor::new(CountsWrites(far, Arc::clone(&answers)).compat());
        tokio::spawn(async move {
            while let Some(mut stream) = acceptor.accept().await {
                tokio::spawn(async move {
                    stream.read_u64().await.unwrap();
                    stream.write_all(b"first").await.unwrap();
                    stream.write_all(b", second").await.unwrap();
                    stream.shutdown().await.unwrap();
                });
            }
        });

        let mut writes = (0, 0);
        for round in 0..2 {
            let mut stream = opener.open(1024).await.unwrap();
            stream.write_all(b"as").await.unwrap();
            stream.write_all(b"ks").await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer, b"first, second");

            let before = writes;
            writes = (asks.load(Ordering::Relaxed), answers.load(Ordering::Relaxed));
            // In the first round yamux also measures the round-trip time.
            if round > 0 {
                assert_eq!((writes.0 - before.0, writes.1 - before.1), (1, 1));
            }
            drop(stream);
            // Let everything that follows from the drop run.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            writes = (asks.load(Ordering::Relaxed), answers.load(Ordering::Relaxed));
        }
    }

    #[tokio::test]
    async fn buffer_of_the_connection_below_is_flushed() {
        let (near, far) = duplex(8192);
        let (opener, driver) = Opener::new(tokio::io::BufWriter::new(near));
        tokio::spawn(driver);
        let mut acceptor = Acceptor::new(far.compat());
        let accepted = tokio::spawn(async move { acceptor.accept().await.is_some() });

        let mut stream = opener.open(1024).await.unwrap();
        stream.flush().await.unwrap();

        let limit = std::time::Duration::from_secs(20);
        assert!(tokio::time::timeout(limit, accepted).await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn stream_is_opened_by_a_read_alone() {
        let (opener, _driver) = echo_channel();
        let mut stream = opener.open(1024).await.unwrap();

        assert_eq!(stream.read_u32().await.unwrap(), 1024);
    }

    /// A channel whose guest echoes every stream, with the port in front.
    fn echo_channel() -> (Opener, tokio::task::JoinHandle<()>) {
        let (near, far) = duplex(8192);
        tokio::spawn(async move {
            let mut acceptor = Acceptor::new(far.compat());
            while let Some(mut stream) = acceptor.accept().await {
                tokio::spawn(async move {
                    let port = read_port(&mut stream).await.unwrap();
                    stream.write_all(&port.to_be_bytes()).await.unwrap();
                    let (mut from, mut to) = tokio::io::split(stream);
                    tokio::io::copy(&mut from, &mut to).await.unwrap();
                    to.shutdown().await.unwrap();
                });
            }
        });
        let (opener, driver) = Opener::new(near);
        (opener, tokio::spawn(driver))
    }

    #[tokio::test]
    async fn half_closed_stream_still_receives() {
        let (opener, _driver) = echo_channel();
        let mut stream = opener.open(1025).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();

        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();

        assert_eq!(answer, [&1025u32.to_be_bytes()[..], b"hello"].concat());
    }

    #[tokio::test]
    async fn hundred_streams_carry_a_mebibyte_each_without_mixing() {
        let (opener, _driver) = echo_channel();
        let streams = (0..100u8).map(|byte| {
            let opener = opener.clone();
            tokio::spawn(async move {
                let stream = opener.open(1024).await.unwrap();
                let (mut from, mut to) = tokio::io::split(stream);
                let writing = tokio::spawn(async move {
                    to.write_all(&vec![byte; 1 << 20]).await.unwrap();
                    to.shutdown().await.unwrap();
                });
                assert_eq!(from.read_u32().await.unwrap(), 1024);
                let mut echoed = Vec::new();
                from.read_to_end(&mut echoed).await.unwrap();
                writing.await.unwrap();
                assert!(echoed.len() == 1 << 20 && echoed.iter().all(|b| *b == byte));
            })
        });

        for stream in streams.collect::<Vec<_>>() {
            stream.await.unwrap();
        }
    }

    #[tokio::test]
    async fn opener_reports_a_closed_channel() {
        let (near, far) = duplex(8192);
        let (opener, driver) = Opener::new(near);
        let driver = tokio::spawn(driver);
        drop(far);
        driver.await.unwrap();

        assert_eq!(opener.open(1024).await.unwrap_err(), OpenError::Closed);
        assert!(opener.is_closed());
    }

    #[tokio::test]
    async fn streams_over_the_limit_are_refused_and_others_go_on() {
        let (opener, _driver) = echo_channel();
        let mut streams = Vec::new();
        for _ in 0..STREAMS_MAX {
            let mut stream = opener.open(1024).await.unwrap();
            stream.read_u32().await.unwrap();
            streams.push(stream);
        }

        assert_eq!(opener.open(1024).await.unwrap_err(), OpenError::TooMany);

        streams.pop();
        streams[0].write_all(b"still").await.unwrap();
        let mut echoed = [0; 5];
        streams[0].read_exact(&mut echoed).await.unwrap();
        opener.open(1024).await.unwrap();
    }

    #[tokio::test]
    async fn driver_ends_with_its_last_handle() {
        let (opener, driver) = echo_channel();
        let stream = opener.open(1024).await.unwrap();
        drop(opener);
        assert!(!driver.is_finished());
        drop(stream);

        driver.await.unwrap();
    }
}
