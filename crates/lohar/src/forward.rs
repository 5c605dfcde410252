//! Relays a connection to a TCP port of the guest's loopback.

use std::io;
use std::time::Duration;

use bhatti_proto::{
    FORWARD_PORT, ForwardRequest, ForwardResponse, FrameReader, FrameType, FrameWriter,
};
use tokio::io::{AsyncWriteExt, copy};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::connection::{Transport, split};
use crate::log::errno_text;

/// How long the port may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Serves one connection to [`FORWARD_PORT`].
pub(crate) async fn serve<T: Transport>(transport: T) -> io::Result<()> {
    let (from_host, to_host) = split(transport);
    let (mut reader, mut writer) = (FrameReader::new(from_host), FrameWriter::new(to_host));
    let Ok(Some(frame)) = reader.next().await else { return Ok(()) };
    if frame.frame_type != FrameType::FWD_REQ {
        let message = format!("expected FWD_REQ, got {}", frame.frame_type);
        return writer.send(FrameType::ERROR, message.as_bytes()).await;
    }
    let connected = match frame.json::<ForwardRequest>() {
        Ok(request) => connect(request.port).await,
        Err(error) => Err(format!("bad forward request: {error}")),
    };
    let (status, message) = match &connected {
        Ok(_) => ("ok".to_owned(), None),
        Err(message) => ("error".to_owned(), Some(message.clone())),
    };
    let response = ForwardResponse { status, message };
    writer.send_json(FrameType::FWD_RESP, &response).await.map_err(io::Error::other)?;
    let Ok(mut target) = connected else { return Ok(()) };

    let (mut from_target, mut to_target) = target.split();
    let (mut from_host, early) = reader.into_parts();
    let mut to_host = writer.into_inner();
    let inbound = async {
        to_target.write_all(&early).await?;
        copy(&mut from_host, &mut to_target).await?;
        to_target.shutdown().await
    };
    let outbound = async {
        copy(&mut from_target, &mut to_host).await?;
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
