//! A resync of the channel on every host connect.
//!
//! A virtio-serial port is one byte stream that outlives both peers. The host's end closes and
//! opens again when the daemon restarts or the VM is restored. The guest may not notice, and
//! bytes of the old conversation, perhaps half a frame, are still on their way in both
//! directions. So each host connect begins with a handshake that cannot be mistaken for other
//! bytes:
//!
//! ```text
//!  host → guest   F7 01 ‖ escape(generation ‖ epoch)      "hello"; everything before it is void
//!  guest → host   ACK_MAGIC ‖ generation ‖ epoch          "ack"; everything before it is void
//! ```
//!
//! *Epoch* is 16 bytes that the host draws anew each time, so no stale byte can look like the
//! ack. In all later bytes from host to guest, the byte `F7` is *escaped* as `F7 00`. So `F7 01`
//! occurs in a hello and nowhere else, wherever the last conversation broke off. (`F7` never
//! occurs in UTF-8 and seldom elsewhere.) The other direction needs no escaping.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

/// The version of the bytes after the handshake. The guest answers with its own generation, and
/// this host refuses an agent of another one.
pub const GENERATION: u8 = 1;

/// Random bytes that identify one connection.
pub type Epoch = [u8; 16];

const ESCAPE: u8 = 0xf7;
const ESCAPED_ESCAPE: u8 = 0x00;
const ESCAPED_HELLO: u8 = 0x01;
const ACK_MAGIC: [u8; 8] = *b"\xf7bhatti\n";
const HELLO_BODY_BYTES: usize = 1 + 16;
const ACK_BYTES: usize = ACK_MAGIC.len() + HELLO_BODY_BYTES;

/// Stale bytes that a guest may send before its ack, in bytes: more than the port and the sockets
/// can hold.
const STALE_BYTES_MAX: usize = 16 << 20;

/// The most plain bytes that one write accepts, so that their escaped form stays small.
const WRITE_BYTES_MAX: usize = 64 * 1024;

/// The bytes that a small read asks for: one read serves several of them.
const READ_BYTES: usize = 4096;

/// The first message of the host, and the content of the guest's ack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The sender's [`GENERATION`].
    pub generation: u8,
    /// The epoch of the connection.
    pub epoch: Epoch,
}

impl Hello {
    fn body(&self) -> [u8; HELLO_BODY_BYTES] {
        let mut body = [self.generation; HELLO_BODY_BYTES];
        body[1..].copy_from_slice(&self.epoch);
        body
    }

    /// Returns the bytes that the host sends.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![ESCAPE, ESCAPED_HELLO];
        escape(&self.body(), &mut bytes);
        bytes
    }

    /// Returns the bytes that the guest answers.
    #[must_use]
    pub fn encode_ack(&self) -> Vec<u8> {
        let mut bytes = ACK_MAGIC.to_vec();
        bytes.extend_from_slice(&self.body());
        bytes
    }
}

/// Appends the escaped form of `plain` to `out`.
pub fn escape(plain: &[u8], out: &mut Vec<u8>) {
    out.reserve(plain.len());
    let mut rest = plain;
    while let Some(at) = memchr::memchr(ESCAPE, rest) {
        out.extend_from_slice(&rest[..=at]);
        out.push(ESCAPED_ESCAPE);
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
}

/// The guest's decoder of the stream: data, and a [`Hello`] per host connect.
#[derive(Debug, Default)]
pub struct Decoder {
    escaped: bool,
    hello_body: Option<Vec<u8>>,
}

impl Decoder {
    /// Decodes the start of `input`, appending plain bytes to `data`.
    ///
    /// Consumes all of `input` and returns `None`, or stops after a hello and returns that. All
    /// data before the hello is then void, and the rest of `input` belongs to the new connection.
    pub fn decode(&mut self, input: &mut &[u8], data: &mut BytesMut) -> Option<Hello> {
        while !input.is_empty() {
            if std::mem::take(&mut self.escaped) {
                match input.get_u8() {
                    ESCAPED_HELLO => self.hello_body = Some(Vec::with_capacity(HELLO_BODY_BYTES)),
                    // The last conversation broke off right after an escape, and the next one
                    // begins with an escape.
                    ESCAPE => self.escaped = true,
                    // Peers send only `ESCAPED_ESCAPE`. Any other code is noise, and noise counts
                    // as data here.
                    _ => self.take(&[ESCAPE], data),
                }
            } else {
                let plain = memchr::memchr(ESCAPE, input).unwrap_or(input.len());
                let wanted = self
                    .hello_body
                    .as_ref()
                    .map_or(plain, |body| plain.min(HELLO_BODY_BYTES - body.len()));
                self.take(&input[..wanted], data);
                *input = &input[wanted..];
                if wanted == plain && !input.is_empty() && !self.hello_is_complete() {
                    input.advance(1);
                    self.escaped = true;
                }
            }
            if self.hello_is_complete() {
                let body = self.hello_body.take()?;
                let mut epoch = Epoch::default();
                epoch.copy_from_slice(&body[1..]);
                return Some(Hello { generation: body[0], epoch });
            }
        }
        None
    }

    fn take(&mut self, bytes: &[u8], data: &mut BytesMut) {
        match &mut self.hello_body {
            Some(body) => body.extend_from_slice(bytes),
            None => data.extend_from_slice(bytes),
        }
    }

    fn hello_is_complete(&self) -> bool {
        self.hello_body.as_ref().is_some_and(|body| body.len() == HELLO_BODY_BYTES)
    }
}

/// The handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum GreetError {
    /// The stream failed or ended.
    #[error("the agent channel broke before the guest answered")]
    Io(#[source] io::Error),
    /// The guest sent other bytes than an ack, and more than stale bytes can explain.
    #[error("the guest sent {STALE_BYTES_MAX} bytes and no answer to the handshake")]
    Noise,
    /// The agent speaks another generation of the channel.
    #[error(
        "the guest agent speaks generation {generation} of the channel; this host speaks {GENERATION}"
    )]
    Generation {
        /// The generation that the agent answered.
        generation: u8,
    },
}

/// Sends a hello on a fresh connection and waits for the ack.
///
/// # Errors
///
/// Returns an error if the stream fails, if the guest sends only noise, or if its generation
/// differs. There is no timeout: the guest may still be booting.
///
/// # Cancel safety
///
/// Not cancel safe: drop the stream together with the future.
pub async fn greet<S>(mut stream: S, epoch: Epoch) -> Result<HostStream<S>, GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let hello = Hello { generation: GENERATION, epoch };
    stream.write_all(&hello.encode()).await.map_err(GreetError::Io)?;
    let mut received = BytesMut::with_capacity(4096);
    let mut discarded = 0;
    loop {
        if stream.read_buf(&mut received).await.map_err(GreetError::Io)? == 0 {
            return Err(GreetError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        if let Some(generation) = find_ack(&mut received, &epoch, &mut discarded) {
            if generation != GENERATION {
                return Err(GreetError::Generation { generation });
            }
            return Ok(HostStream { inner: stream, received, escaped: BytesMut::new() });
        }
        if discarded > STALE_BYTES_MAX {
            return Err(GreetError::Noise);
        }
    }
}

/// Consumes `received` up to the end of the ack, or all bytes that cannot begin an ack.
fn find_ack(received: &mut BytesMut, epoch: &Epoch, discarded: &mut usize) -> Option<u8> {
    let mut from = 0;
    while let Some(at) = memchr::memmem::find(&received[from..], &ACK_MAGIC).map(|at| from + at) {
        let Some(ack) = received.get(at..at + ACK_BYTES) else { break };
        if ack[ACK_MAGIC.len() + 1..] == epoch[..] {
            let generation = ack[ACK_MAGIC.len()];
            received.advance(at + ACK_BYTES);
            return Some(generation);
        }
        from = at + 1;
    }
    let kept = received.len().min(ACK_BYTES - 1);
    *discarded += received.len() - kept;
    received.advance(received.len() - kept);
    None
}

/// The host's end of the channel after the handshake. Escapes the bytes that are written.
#[derive(Debug)]
pub struct HostStream<S> {
    inner: S,
    received: BytesMut,
    escaped: BytesMut,
}

impl<S: AsyncWrite + Unpin> HostStream<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.escaped.is_empty() {
            let written = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.escaped))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.escaped.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HostStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.received.is_empty() {
            if buf.remaining() >= READ_BYTES {
                return Pin::new(&mut self.inner).poll_read(cx, buf);
            }
            // The caller wants many small parts, and one read of the stream serves them.
            let this = &mut *self;
            this.received.reserve(READ_BYTES);
            let mut read = pin!(this.inner.read_buf(&mut this.received));
            ready!(read.as_mut().poll(cx))?;
        }
        let length = self.received.len().min(buf.remaining());
        buf.put_slice(&self.received.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HostStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_drain(cx))?;
        let plain = &buf[..buf.len().min(WRITE_BYTES_MAX)];
        if memchr::memchr(ESCAPE, plain).is_none() {
            return Pin::new(&mut self.inner).poll_write(cx, plain);
        }
        let mut escaped = Vec::new();
        escape(plain, &mut escaped);
        self.escaped.extend_from_slice(&escaped);
        // The bytes are accepted. The next write or flush sends those that the stream cannot take
        // now.
        if let Poll::Ready(Err(error)) = self.poll_drain(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(plain.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
