//! `/sandboxes/{sandbox}/forward/{port}`: a TCP connection to a port in the guest, on a WebSocket.
//!
//! What is sent goes in binary messages, in pieces of any length; an empty one ends its direction.

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
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::status::ApiError;
use crate::websocket::{self, Receiver, Sender, Upgrade};

/// What is read at once, in bytes.
const PIECE_BYTES: usize = 64 * 1024;

/// How long an application that takes nothing more may go on sending.
const HALF_OPEN_LIMIT: Duration = Duration::from_secs(30);

/// Connects to a TCP port of the guest's loopback, whatever is spoken there. It needs no network in the guest.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/forward/{port}", tag = "ports", params(("sandbox" = String, Path), ("port" = u16, Path)),
    responses((status = 101, description = "The WebSocket is open, and so is the port."), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath((called, port)): ApiPath<(String, u16)>,
    upgrade: Result<Upgrade, ApiError>,
) -> Result<Response, ApiError> {
    state.control.find_id(owner, &called)?;
    if port == 0 {
        return Err(ApiError::new(ErrorCode::BadRequest, "port must be 1 to 65535"));
    }
    let upgrade = upgrade?;
    let used = state.control.enter(owner, &called).await?;
    let stream = used.agent.forward(port).await?;
    Ok(upgrade.serve(move |socket| async move {
        let _open = (state.metrics.open_websocket(), used);
        let (sender, mut receiver) = websocket::split(socket);
        let (reader, writer) = split(stream);
        tokio::select! {
            () = relay((reader, writer), &sender, &mut receiver) => {}
            _ended = state.ended(owner) => {}
        }
        sender.hang_up(&mut receiver).await;
    }))
}

type Reader = ReadHalf<Box<dyn AgentStream>>;
type Writer = WriteHalf<Box<dyn AgentStream>>;

/// Relays both directions until both have ended or the client has gone. An application may say nothing to a client that has gone, so
/// its direction is not waited for then.
async fn relay((reader, writer): (Reader, Writer), sender: &Sender, receiver: &mut Receiver) {
    let mut sending = pin!(send(reader, sender));
    let mut receiving = pin!(receive(writer, sender, receiver));
    tokio::select! {
        ended = &mut receiving => {
            if ended == Ended::ByGuest {
                // It takes nothing more, and may still have something to say.
                drop(timeout(HALF_OPEN_LIMIT, sending).await);
            }
        }
        // The client may go on; when it goes, `receive` ends.
        () = &mut sending => drop(receiving.await),
    }
}

/// Why nothing more is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The client has gone.
    ByClient,
    /// The application takes nothing more.
    ByGuest,
}

/// Sends what the guest sends, until it has ended its direction.
async fn send(mut reader: Reader, sender: &Sender) {
    let mut piece = BytesMut::new();
    loop {
        piece.reserve(PIECE_BYTES);
        // A connection that breaks has ended, too.
        let length = reader.read_buf(&mut piece).await.unwrap_or_default();
        if sender.send(Message::Binary(piece.split().freeze())).await.is_none() || length == 0 {
            return;
        }
    }
}

/// Passes on what the client sends, until it has gone.
async fn receive(mut writer: Writer, sender: &Sender, receiver: &mut Receiver) -> Ended {
    while let Some(message) = receiver.next(sender).await {
        let bytes: Bytes = match message {
            Message::Binary(bytes) => bytes,
            // Nothing else means anything here.
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
