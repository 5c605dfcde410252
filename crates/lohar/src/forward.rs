//! Relays a connection to a TCP port of the guest's loopback.

use std::io;
use std::time::Duration;

use bhatti_proto::{
    ErrorKind, FORWARD_PORT, ForwardRequest, ForwardResponse, Frame, FrameType, relay_as_frames,
};
use bytes::BytesMut;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::WriteHalf;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use crate::Agent;
use crate::connection::{Half, HostReader, HostWriter, Transport};
use crate::log::errno_text;
use crate::refusal::{OpError, host_gone, refused};

/// How long the port may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Bytes that are copied at once.
const PIECE_BYTES: usize = 16 << 10;

/// How often the agent checks that the host is still connected, while the application does not
/// read or the host sends no more.
const HOST_CHECK: Duration = Duration::from_millis(250);

/// Serves one connection to [`FORWARD_PORT`], which began with `frame`.
pub(crate) async fn serve<T: Transport>(
    agent: &Agent,
    frame: &Frame,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    if frame.frame_type != FrameType::FWD_REQ {
        let message = format!("expected FWD_REQ, got {}", frame.frame_type);
        return Err(refused(ErrorKind::BadRequest, message).into());
    }
    agent.touch();
    let connected = match frame.json::<ForwardRequest>() {
        Ok(request) => connect(request.port).await.map(|target| (target, request.framed)),
        Err(error) => Err(format!("bad forward request: {error}")),
    };
    let (status, message, framed) = match &connected {
        Ok((_, framed)) => ("ok".to_owned(), None, *framed),
        Err(message) => ("error".to_owned(), Some(message.clone()), false),
    };
    writer.send_json(FrameType::FWD_RESP, &ForwardResponse { status, message, framed }).await?;
    let Ok((target, _)) = connected else { return Ok(()) };
    let relayed = if framed {
        relay_as_frames(target, &mut reader, writer).await
    } else {
        relay(target, reader, writer).await
    };
    relayed.map_err(host_gone)
}

/// Copies both ways. Each direction ends on its own: an application that reads no more may still
/// send an answer. Ends at once if the host has gone, even if the application neither sends nor
/// reads: the application may wait for its client forever.
async fn relay<T: Transport>(
    mut target: TcpStream,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> io::Result<()> {
    let (mut from_target, mut to_target) = target.split();
    let (mut from_host, early) = reader.into_parts();
    let to_host = writer.get_mut();
    let inbound_ended = Notify::new();
    let inbound = async {
        let mut takes_more = write(&mut to_target, &early, &from_host).await?;
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        while from_host.read_buf(&mut piece).await? > 0 {
            takes_more = takes_more && write(&mut to_target, &piece, &from_host).await?;
            piece.clear();
        }
        drop(to_target.shutdown().await);
        inbound_ended.notify_one();
        Err(gone(&from_host).await)
    };
    let outbound = async {
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        // A connection that breaks has ended, too: bytes that the application sent before still
        // reach the host.
        while from_target.read_buf(&mut piece).await.unwrap_or_default() > 0 {
            to_host.write_all(&piece).await?;
            piece.clear();
        }
        to_host.shutdown().await?;
        inbound_ended.notified().await;
        Ok(())
    };
    let ended = tokio::select! {
        ended = inbound => ended,
        ended = outbound => ended,
    };
    if ended.is_err() {
        // Reset the connection: an orderly end would queue behind bytes that the application has
        // not read.
        let _: Result<(), Errno> = set_socket_linger(&target, Some(Duration::ZERO));
    }
    ended
}

/// Writes to the application while the host is connected. Returns whether the application takes
/// more.
async fn write<T: Transport>(
    to_target: &mut WriteHalf<'_>,
    bytes: &[u8],
    host: &Half<T>,
) -> io::Result<bool> {
    tokio::select! {
        written = to_target.write_all(bytes) => Ok(written.is_ok()),
        error = gone(host) => Err(error),
    }
}

/// Waits until the host has gone for good.
async fn gone<T: Transport>(host: &Half<T>) -> io::Error {
    loop {
        sleep(HOST_CHECK).await;
        if host.host_is_gone() {
            return io::ErrorKind::ConnectionReset.into();
        }
    }
}

async fn connect(port: u16) -> Result<TcpStream, String> {
    let mut refused = String::new();
    for address in ["127.0.0.1", "::1"] {
        match timeout(CONNECT_LIMIT, TcpStream::connect((address, port))).await {
            Ok(Ok(stream)) => return Ok(stream),
            // The original agent dialed IPv4 only; its error text is kept for that case.
            Ok(Err(error)) if refused.is_empty() => {
                refused = format!("dial tcp {address}:{port}: connect: {}", errno_text(&error));
            }
            Ok(Err(_)) => {}
            Err(_) => return Err(format!("dial tcp {address}:{port}: i/o timeout")),
        }
    }
    Err(refused)
}

/// Whether `port` is this service's.
pub(crate) const fn is_port(port: u32) -> bool {
    port == FORWARD_PORT
}
