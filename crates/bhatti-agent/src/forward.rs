//! Connections to TCP ports of the guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bhatti_engine::AgentStream;
use bhatti_proto::{FORWARD_PORT, ForwardRequest, ForwardResponse, FrameType, relay_as_frames};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::{AgentClient, CallError, Reader, Writer, expect};

/// The most bytes buffered between a stream and its frames, each way.
const WAITING_BYTES: usize = 64 << 10;

/// How long bytes written to a stream may take to reach the guest after the stream was dropped.
const LINGER: Duration = Duration::from_secs(5);

impl AgentClient {
    /// Connects to a TCP port of the guest's loopback. The returned stream is raw, and each
    /// direction ends on its own.
    ///
    /// # Errors
    ///
    /// Returns [`CallError::ForwardRefused`] if nothing accepts connections at the port.
    pub async fn forward(&self, port: u16) -> Result<Box<dyn AgentStream>, CallError> {
        let (mut reader, mut writer) = self.open(FORWARD_PORT).await?;
        let framed = !self.channel.ends_directions_apart();
        writer
            .send_json(FrameType::FWD_REQ, &ForwardRequest { port, framed })
            .await
            .map_err(CallError::Send)?;
        let frame = expect(&mut reader, FrameType::FWD_RESP).await?;
        let response: ForwardResponse = frame.json().map_err(|_| CallError::Unexpected)?;
        if response.status != "ok" {
            return Err(CallError::ForwardRefused {
                port,
                message: response.message.unwrap_or_default(),
            });
        }
        if response.framed {
            return Ok(Box::new(Framed::start(reader, writer)));
        }
        let (reader, early) = reader.frames.into_parts();
        let stream = tokio::io::AsyncReadExt::chain(io::Cursor::new(early), reader);
        Ok(Box::new(tokio::io::join(stream, writer.into_inner())))
    }
}

/// A stream that is relayed as frames.
struct Framed {
    stream: DuplexStream,
    /// Dropped together with the stream, which tells the relay task that the reader has gone.
    _held: oneshot::Sender<()>,
}

impl Framed {
    fn start(mut reader: Reader, mut writer: Writer) -> Self {
        let (stream, other_end) = tokio::io::duplex(WAITING_BYTES);
        let (held, dropped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            tokio::select! {
                // The reader of the stream sees an EOF. The cause has no further use.
                _ = relay_as_frames(other_end, &mut reader.frames, &mut writer) => {}
                () = async { drop(dropped.await); sleep(LINGER).await } => {}
            }
        });
        Self { stream, _held: held }
    }
}

impl AsyncRead for Framed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Framed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
