//! Attaches clients to sessions.

use std::rc::Rc;

use bhatti_proto::{
    ErrorKind, ExecRequest, FrameType, InputEnd, TAKEN_OVER, exit_payload, parse_resize,
    session_exit_payload,
};
use bytes::Bytes;
use rustix::process::Signal;

use super::output::Piece;
use super::{Session, find};
use crate::Agent;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::input;
use crate::launch::set_size;
use crate::reaper::Ended;
use crate::refusal::{OpError, host_gone, refused};

/// Serves an `EXEC_REQ` that names a session.
pub(crate) async fn serve_attach<T: Transport>(
    agent: &Rc<Agent>,
    request: &ExecRequest,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let session = find(agent, request.session_id.as_deref().unwrap_or_default())?;
    if let Some(end) = request.input {
        return take_input(agent, &session, end, reader, writer).await;
    }
    if request.observe {
        return observe(&session, request, reader, writer).await;
    }
    serve(agent, &session, request, reader, writer).await
}

/// How an attachment ended.
enum Outcome {
    /// The process ended, and all output was sent.
    Ended(Ended),
    /// Another client took the session over.
    Displaced,
}

/// Attaches the client until the client leaves, the process ends, or another client takes the
/// session over.
pub(super) async fn serve<T: Transport>(
    agent: &Rc<Agent>,
    session: &Rc<Session>,
    request: &ExecRequest,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let attached = Attached { session, generation: session.attach(request.output_offset) };
    writer.send_json(FrameType::SESSION_INFO, &session.info_in_full()).await?;
    let outcome = tokio::select! {
        outcome = attached.follow(writer) => outcome?,
        () = receive(agent, session, reader) => return Err(OpError::HostGone),
    };
    let payload = match outcome {
        Outcome::Ended(end) => exit(end, request),
        // No signal has the number 0.
        Outcome::Displaced => exit(Ended { code: 0, signal: Some(TAKEN_OVER) }, request),
    };
    writer.send(FrameType::EXIT, &payload).await.map_err(host_gone)?;
    // The exit code of a terminal session is collected once. A job's exit code is kept, because
    // this client may be cut off before it has read the code.
    if matches!(outcome, Outcome::Ended(_)) && !session.is_job() {
        agent.sessions.remove(session);
    }
    Ok(())
}

/// Returns the payload of `EXIT`. Hosts that ask for no details expect the code alone.
fn exit(Ended { code, signal }: Ended, request: &ExecRequest) -> Vec<u8> {
    session_exit_payload(code, signal.filter(|_| request.error_details))
}

/// Sends a session's output and its exit code to an observer, which is not the attached client.
async fn observe<T: Transport>(
    session: &Session,
    request: &ExecRequest,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    writer.send_json(FrameType::SESSION_INFO, &session.info_in_full()).await?;
    let host_gone_away = async { while let Ok(Some(_)) = reader.next().await {} };
    tokio::select! {
        end = send_output(session, request.output_offset, writer) => {
            writer.send(FrameType::EXIT, &exit(end?, request)).await.map_err(host_gone)
        }
        () = host_gone_away => Err(OpError::HostGone),
    }
}

/// Sends output from an offset on, until the process has ended, and returns how it ended. Returns
/// an error if a job's output was discarded before it was sent: output after a gap would be
/// misread.
async fn send_output<T: Transport>(
    session: &Session,
    from: Option<u64>,
    writer: &mut HostWriter<T>,
) -> Result<Ended, OpError> {
    let (start, end) = {
        let output = session.output.borrow();
        (output.start(), output.end())
    };
    let mut position = from.unwrap_or(start).clamp(start, end);
    loop {
        let mut changed = std::pin::pin!(session.changed.notified());
        // From here on no change is missed.
        changed.as_mut().enable();
        let piece = session.output.borrow_mut().read(position);
        if let Some(Piece { frame_type, bytes, at }) = piece {
            if at != position && session.is_job() {
                let message = format!("output from {position} to {at} is no longer kept");
                return Err(refused(ErrorKind::Limit, message).into());
            }
            position = at + bytes.len() as u64;
            writer.send(frame_type, &bytes).await.map_err(host_gone)?;
        } else if let Some(end) = session.end.get() {
            return Ok(end);
        } else {
            changed.await;
        }
    }
}

/// An attachment. Dropping it detaches the client.
struct Attached<'a> {
    session: &'a Rc<Session>,
    generation: u64,
}

impl Attached<'_> {
    /// Sends the output from the client's position on.
    async fn follow<T: Transport>(&self, writer: &mut HostWriter<T>) -> Result<Outcome, OpError> {
        loop {
            match self.next() {
                Next::Piece(Piece { frame_type, bytes, .. }) => {
                    writer.send(frame_type, &bytes).await.map_err(host_gone)?;
                }
                Next::Wait => self.session.changed.notified().await,
                Next::Over(outcome) => return Ok(outcome),
            }
        }
    }

    fn next(&self) -> Next {
        let mut attachment = self.session.attachment.borrow_mut();
        let Some(position) =
            attachment.position.filter(|_| attachment.generation == self.generation)
        else {
            return Next::Over(Outcome::Displaced);
        };
        let Some(piece) = self.session.output.borrow_mut().read(position) else {
            let ended = self.session.end.get().map(Outcome::Ended);
            return ended.map_or(Next::Wait, Next::Over);
        };
        attachment.position = Some(piece.at + piece.bytes.len() as u64);
        // The pump may be waiting for the room.
        self.session.changed.notify_waiters();
        Next::Piece(piece)
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.session.detach(self.generation);
    }
}

enum Next {
    Piece(Piece),
    Wait,
    Over(Outcome),
}

/// Passes the client's frames on to the session, until the client goes away.
async fn receive<T: Transport>(agent: &Agent, session: &Session, mut reader: HostReader<T>) {
    while let Ok(Some(frame)) = reader.next().await {
        match frame.frame_type {
            FrameType::STDIN
                if !queue_input(agent, session, &reader, frame.payload.clone()).await =>
            {
                return;
            }
            FrameType::STDIN_EOF => drop(session.stdin.take()),
            FrameType::RESIZE => resize(session, &frame.payload),
            FrameType::KILL => {
                session.signal(if session.is_job() { Signal::KILL } else { Signal::TERM });
            }
            FrameType::SIGNAL => {
                if let Some(signal) = input::named_signal(&frame.payload) {
                    session.signal(signal);
                }
            }
            _ => {}
        }
    }
}

/// Queues input for the process, and waits while its queue is full. Returns false if the host is
/// gone.
async fn queue_input<T: Transport>(
    agent: &Agent,
    session: &Session,
    reader: &HostReader<T>,
    bytes: Bytes,
) -> bool {
    agent.touch();
    let stdin = session.stdin.borrow().clone();
    input::enqueue_for(reader, stdin.as_ref(), &session.room, bytes).await
}

/// Takes input from a host that is not the attached client.
async fn take_input<T: Transport>(
    agent: &Agent,
    session: &Session,
    end: InputEnd,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let takes_none = session.stdin.borrow().is_none();
    if takes_none && end == InputEnd::Continue {
        return Err(refused(ErrorKind::BadRequest, "the session takes no input").into());
    }
    writer.send_json(FrameType::SESSION_INFO, &session.info_in_full()).await?;
    while let Some(frame) = reader.next().await? {
        match frame.frame_type {
            FrameType::STDIN
                if !queue_input(agent, session, &reader, frame.payload.clone()).await =>
            {
                return Err(OpError::HostGone);
            }
            FrameType::RESIZE => resize(session, &frame.payload),
            FrameType::STDIN_EOF => {
                if end == InputEnd::Close {
                    session.stdin.take();
                }
                return writer.send(FrameType::EXIT, &exit_payload(0)).await.map_err(host_gone);
            }
            _ => {}
        }
    }
    Err(OpError::HostGone)
}

fn resize(session: &Session, payload: &[u8]) {
    if let (Some(terminal), Some((rows, cols))) = (&session.terminal, parse_resize(payload)) {
        // A terminal whose process has just ended needs no size.
        drop(set_size(terminal.get_ref(), rows, cols));
    }
}
