//! Writing files: whole or not at all.

use std::path::Path;

use bhatti_proto::{AgentError, ErrorKind, FileWriteRequest, FrameType, InPlace, StatusOk};
use bytes::Bytes;
use rustix::fs::{Gid, Uid};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::in_place::InPlaceFile;
use super::target::{Durable, NewFile, Owner, too_large};
use super::{checked, parse_mode, worker};
use crate::Agent;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::refusal::{OpError, refused};
use crate::user::USUAL_UID;

/// Pieces that may wait for the disk.
const PIECES_WAITING: usize = 4;

/// A message to the writing thread. If the sender is dropped before `End`, nothing is written.
enum Piece {
    Content(Bytes),
    End,
}

/// Serves one `FILE_WRITE_REQ`.
pub(crate) async fn write<T: Transport>(
    agent: &Agent,
    request: &FileWriteRequest,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let negative = |_| refused(ErrorKind::BadRequest, "file size must be >= 0");
    let size = if request.until_eof { Ok(None) } else { u64::try_from(request.size).map(Some) };
    let (size, limit) = (size.map_err(negative)?, agent.limits.file_bytes);
    if let Some(size) = size.filter(|size| *size > limit) {
        return Err(too_large(size, limit).into());
    }
    let mode = parse_mode(&request.mode)?;
    let owner = (request.configures && agent.place.is_guest()).then(usual_owner);
    // A write to a frozen volume blocks until the volume is thawed. Waiting here occupies no
    // thread.
    agent.awake().await;
    let (sender, mut pieces) = mpsc::channel(PIECES_WAITING);
    let in_place = request.in_place.clone();
    let is_agents = request.configures || in_place.is_some();
    let writing = move || {
        if let Some(in_place) = in_place {
            return write_in_place(&path, &in_place, &mut pieces);
        }
        let mut new = NewFile::create(&path, owner)?;
        while let Some(piece) = pieces.blocking_recv() {
            match piece {
                Piece::Content(bytes) => new.write(&bytes)?,
                Piece::End => return new.finish(mode, Durable::Yes),
            }
        }
        // The task that dropped the sender tells the host why.
        Ok(())
    };
    let mut writing = if is_agents {
        worker::begin_as_agent(agent, writing).await?
    } else {
        worker::begin(agent, request.user.as_deref(), writing).await?
    };
    let length = Length { announced: size, limit };
    let received = tokio::select! {
        biased;
        failed = writing.end() => return failed.and(Err(OpError::HostGone)),
        received = receive(agent, length, &mut reader, &sender) => received,
    };
    if received.is_ok() {
        // If the thread has ended, its error is returned below.
        drop(sender.send(Piece::End).await);
    }
    drop(sender);
    let written = writing.end().await;
    received?;
    written?;
    Ok(writer.send_json(FrameType::FILE_WRITE_RESP, &StatusOk { status: "ok".to_owned() }).await?)
}

/// Writes a file in place. What was written before an error stays.
fn write_in_place(
    path: &Path,
    how: &InPlace,
    pieces: &mut mpsc::Receiver<Piece>,
) -> Result<(), AgentError> {
    let mut file = InPlaceFile::create(path, how)?;
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Piece::Content(bytes) => file.write(&bytes)?,
            Piece::End => return file.flush(),
        }
    }
    Ok(())
}

/// The expected length of the content.
struct Length {
    /// The size; `None` if the host marks the end of the content.
    announced: Option<u64>,
    limit: u64,
}

/// Moves the content to the writing thread.
async fn receive<T: Transport>(
    agent: &Agent,
    Length { announced, limit }: Length,
    reader: &mut HostReader<T>,
    pieces: &mpsc::Sender<Piece>,
) -> Result<(), OpError> {
    let mut written = 0;
    let of = announced.map_or_else(String::new, |size| format!("/{size}"));
    while announced != Some(written) {
        let lost =
            || refused(ErrorKind::Other, format!("connection lost after {written}{of} bytes"));
        let stalled = |_| {
            refused(ErrorKind::Limit, format!("no data came in time, after {written}{of} bytes"))
        };
        let next = timeout(agent.limits.write(), reader.next()).await.map_err(stalled)?;
        let frame = next.ok().flatten().ok_or_else(lost)?;
        match frame.frame_type {
            FrameType::STDIN => {}
            FrameType::STDIN_EOF if announced.is_none() => return Ok(()),
            _ => continue,
        }
        written += frame.payload.len() as u64;
        if let Some(size) = announced.filter(|size| written > *size) {
            let message = format!("received more than the announced {size} bytes");
            return Err(refused(ErrorKind::BadRequest, message).into());
        }
        if written > limit {
            return Err(too_large(written, limit).into());
        }
        agent.awake().await;
        if pieces.send(Piece::Content(frame.payload)).await.is_err() {
            // The writing thread has ended: let the caller take its error first.
            std::future::pending::<()>().await;
        }
    }
    Ok(())
}

/// Writes a file of the guest's configuration, as the agent. In a guest, a new file belongs to
/// the usual user.
pub(crate) fn write_whole(
    path: &str,
    content: &[u8],
    mode: Option<u32>,
    is_guest: bool,
) -> Result<(), AgentError> {
    let mut new = NewFile::create(&checked(path)?, is_guest.then(usual_owner))?;
    new.write(content)?;
    new.finish(mode, Durable::Yes)
}

fn usual_owner() -> Owner {
    Owner { uid: Uid::from_raw(USUAL_UID), gid: Gid::from_raw(USUAL_UID) }
}
