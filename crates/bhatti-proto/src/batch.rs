//! Batched writes: small writes that leave as one.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::io::{AsyncRead, AsyncWrite};

/// The number of buffered bytes that forces a write, even if no read follows.
const KEPT_BYTES_MAX: usize = 64 * 1024;

/// The most buffer memory that is kept for later writes, in bytes.
const SPARE_BYTES_MAX: usize = 4096;

/// A stream that buffers writes until the next read, or until [`KEPT_BYTES_MAX`] bytes wait. A
/// multiplexer writes the parts of its frames one by one, and reads when it has no more to write:
/// the peer is woken once instead of for each part.
#[derive(Debug)]
pub(crate) struct Batched<S> {
    inner: S,
    kept: Vec<u8>,
    /// How many bytes of `kept` are written.
    written: usize,
}

impl<S> Batched<S> {
    pub(crate) const fn new(inner: S) -> Self {
        Self { inner, kept: Vec::new(), written: 0 }
    }
}

impl<S: AsyncWrite + Unpin> Batched<S> {
    fn poll_write_kept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.kept.len() {
            let rest = &self.kept[self.written..];
            match ready!(Pin::new(&mut self.inner).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.written += written,
            }
        }
        self.kept.clear();
        self.kept.shrink_to(SPARE_BYTES_MAX);
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    /// Writes out all buffered bytes and flushes the stream below.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_kept(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Batched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        // If the stream cannot take the bytes now, it wakes this task when it can, and the next
        // poll sends them.
        if let Poll::Ready(Err(error)) = self.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Batched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.kept.len() >= KEPT_BYTES_MAX {
            ready!(self.poll_write_kept(cx))?;
        }
        self.kept.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    /// Does nothing: the next read sends the buffered bytes.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_kept(cx))?;
        Pin::new(&mut self.inner).poll_close(cx)
    }
}
