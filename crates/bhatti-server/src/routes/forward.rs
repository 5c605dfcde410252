//! `/sandboxes/{sandbox}/forward/{port}`: a TCP connection to a port in the guest, on a WebSocket.
//!
//! Bytes travel in binary messages of any length. An empty message ends its direction.

use std::pin::pin;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::Message;
use axum::response::Response;

use bhatti_api::ErrorCode;
use bhatti_engine::AgentStream;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::time::timeout;

use crate::AppState;
use crate::extract::ApiPath;
use crate::status::ApiError;
use crate::websocket::{self, Receiver, Sender, Upgrade};
use bhatti_edge::Identity;

/// Number of bytes that are read at once.
const PIECE_BYTES: usize = 64 * 1024;

/// Time limit for an application that reads no more to finish sending.
const HALF_OPEN_LIMIT: Duration = Duration::from_secs(30);

/// Opens a TCP connection to a port of the guest's loopback interface, for any protocol. The
/// guest needs no network.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/forward/{port}", tag = "ports", params(("sandbox" = String, Path), ("port" = u16, Path, minimum = 1)),
    responses((status = 101, description = "The WebSocket is open and connected to the port."), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
    ApiPath((id_or_name, port)): ApiPath<(String, u16)>,
    upgrade: Result<Upgrade, ApiError>,
) -> Result<Response, ApiError> {
    let owner = identity.user();
    state.control.find_id(owner, &id_or_name)?;
    if port == 0 {
        return Err(ApiError::new(ErrorCode::BadRequest, "port must be 1 to 65535"));
    }
    let upgrade = upgrade?;
    let used = state.control.enter(owner, &id_or_name).await?;
    let stream = used.agent.forward(port).await?;
    Ok(upgrade.serve(move |socket| async move {
        let _open = (state.metrics.open_websocket(), used);
        let (sender, mut receiver) = websocket::split(socket);
        let (reader, writer) = split(stream);
        tokio::select! {
            () = relay((reader, writer), &sender, &mut receiver) => {}
            _ended = state.ended(&identity) => {}
        }
        sender.hang_up(&mut receiver).await;
    }))
}

type Reader = ReadHalf<Box<dyn AgentStream>>;
type Writer = WriteHalf<Box<dyn AgentStream>>;

/// Relays both directions until both have ended or the client has gone. An application may stay
/// silent after its client has gone, so the relay then does not wait for the application's
/// direction.
async fn relay((reader, writer): (Reader, Writer), sender: &Sender, receiver: &mut Receiver) {
    let mut sending = pin!(send(reader, sender));
    let mut receiving = pin!(receive(writer, sender, receiver));
    tokio::select! {
        ended = &mut receiving => {
            if ended == Ended::ByGuest {
                // The application reads no more, but may still send.
                drop(timeout(HALF_OPEN_LIMIT, sending).await);
            }
        }
        // The client may continue to send; when it disconnects, `receive` ends.
        () = &mut sending => drop(receiving.await),
    }
}

/// Reason why `receive` has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The client has gone.
    ByClient,
    /// The application reads no more.
    ByGuest,
}

/// Passes the guest's bytes on to the client, until the guest has ended its direction.
async fn send(mut reader: Reader, sender: &Sender) {
    let mut piece = BytesMut::new();
    loop {
        piece.reserve(PIECE_BYTES);
        // A broken connection has ended, too.
        let length = reader.read_buf(&mut piece).await.unwrap_or_default();
        if sender.send(Message::Binary(piece.split().freeze())).await.is_none() || length == 0 {
            return;
        }
    }
}

/// Passes the client's bytes on to the guest, until the client has gone.
async fn receive(mut writer: Writer, sender: &Sender, receiver: &mut Receiver) -> Ended {
    while let Some(message) = receiver.next(sender).await {
        let bytes: Bytes = match message {
            Message::Binary(bytes) => bytes,
            // Other messages have no meaning here.
            _ => continue,
        };
        let passed =
            if bytes.is_empty() { writer.shutdown().await } else { writer.write_all(&bytes).await };
        if passed.is_err() {
            return Ended::ByGuest;
        }
        receiver.heard_now();
    }
    Ended::ByClient
}
