//! Relays a connection to a TCP port of the guest's loopback.

use std::io;
use std::time::Duration;

use bhatti_proto::{
    ErrorKind, FORWARD_PORT, ForwardRequest, ForwardResponse, Frame, FrameType, relay_as_frames,
};
use tokio::io::{AsyncWriteExt, copy};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::agent::Agent;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::log::errno_text;
use crate::refusal::{OpError, host_gone, refused};

/// How long the port may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

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

/// Copies both ways; each direction ends for itself.
async fn relay<T: Transport>(
    mut target: TcpStream,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> io::Result<()> {
    let (mut from_target, mut to_target) = target.split();
    let (mut from_host, early) = reader.into_parts();
    let to_host = writer.get_mut();
    let inbound = async {
        to_target.write_all(&early).await?;
        copy(&mut from_host, &mut to_target).await?;
        to_target.shutdown().await
    };
    let outbound = async {
        copy(&mut from_target, to_host).await?;
        to_host.shutdown().await
    };
    tokio::try_join!(inbound, outbound).map(|_| ())
}

async fn connect(port: u16) -> Result<TcpStream, String> {
    let mut refused = String::new();
    for address in ["127.0.0.1", "::1"] {
        match timeout(CONNECT_LIMIT, TcpStream::connect((address, port))).await {
            Ok(Ok(stream)) => return Ok(stream),
            // The original dialled IPv4 only; its words are kept for that.
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
