//! Serves connections: one connection, one operation.

use std::rc::Rc;
use std::time::Duration;

use bhatti_proto::{
    AgentError, ErrorKind, Frame, FrameReader, FrameType, FrameWriter, GuestInit, Identity,
    ListRequest, MkdirRequest, RemoveRequest, RenameRequest, SessionRef, exit_payload,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::Agent;
use crate::connection::{Half, HostReader, HostWriter, Transport, split};
use crate::limits::AUTH_LIMIT;
use crate::load::load;
use crate::refusal::{OpError, bad_json, host_gone, refused, tell};
use crate::{exec, file, forward, session, settings, suspend};

/// The pause after a failed accept.
pub(crate) const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The sessions in one frame of a full list. With six bytes of JSON for each of its own, a session
/// has at most 28 KiB.
const SESSIONS_PER_FRAME: usize = 32;

/// Serves one connection to the control port, in a task of its own.
pub(crate) fn spawn_control<T: Transport>(agent: &Rc<Agent>, transport: T) {
    let agent = Rc::clone(agent);
    tokio::task::spawn_local(async move {
        let (from_host, to_host) = split(transport);
        let rest = from_host.another();
        let (reader, mut writer) = (FrameReader::new(from_host), FrameWriter::new(to_host));
        let mut details = false;
        let served = control(&agent, reader, &mut writer, &mut details).await;
        close(served, writer, details, rest).await;
    });
}

/// Serves one connection to the forward port, in a task of its own.
pub(crate) fn spawn_forward<T: Transport>(agent: &Rc<Agent>, transport: T) {
    let agent = Rc::clone(agent);
    tokio::task::spawn_local(async move {
        let (from_host, to_host) = split(transport);
        let rest = from_host.another();
        let (mut reader, mut writer) = (FrameReader::new(from_host), FrameWriter::new(to_host));
        let served = async {
            let _counted = agent.count_connection()?;
            let Some(frame) = first_frame(&agent, &mut reader).await? else { return Ok(()) };
            forward::serve(&agent, &frame, reader, &mut writer).await
        };
        let served = served.await;
        close(served, writer, false, rest).await;
    });
}

/// Ends a connection. If the request was refused, sends the reason and waits until the host has
/// read it.
async fn close<T: Transport>(
    served: Result<(), OpError>,
    mut writer: HostWriter<T>,
    details: bool,
    rest: Half<T>,
) {
    // If the reason cannot be sent, the host is gone.
    if let Err(OpError::Refused(error)) = served {
        drop(tell(&mut writer, details, &error).await);
        drop(writer.shutdown().await);
        rest.drain().await;
    } else {
        drop(writer.shutdown().await);
    }
}

/// Receives the request, after authentication if the guest requires it. Returns `None` if the
/// host closes the connection without a request.
async fn first_frame<T: Transport>(
    agent: &Agent,
    reader: &mut HostReader<T>,
) -> Result<Option<Frame>, OpError> {
    if agent.settings.borrow().needs_token() {
        let shown = timeout(AUTH_LIMIT, reader.next()).await;
        let token = shown
            .ok()
            .and_then(Result::ok)
            .flatten()
            .filter(|frame| frame.frame_type == FrameType::AUTH);
        let accepted = token.is_some_and(|frame| agent.settings.borrow().is_token(&frame.payload));
        if !accepted {
            return Err(refused(ErrorKind::Unauthorized, "auth required").into());
        }
    }
    let late = |_| refused(ErrorKind::Limit, "no request came in time");
    Ok(timeout(agent.limits.request(), reader.next()).await.map_err(late)??)
}

async fn control<T: Transport>(
    agent: &Rc<Agent>,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
    details: &mut bool,
) -> Result<(), OpError> {
    let _counted = agent.count_connection()?;
    let Some(frame) = first_frame(agent, &mut reader).await? else { return Ok(()) };
    *details = wants_details(&frame);
    match frame.frame_type {
        FrameType::EXEC_REQ => {
            agent.awake().await;
            exec::serve(agent, &frame, reader, writer).await
        }
        FrameType::FILE_READ_REQ => {
            agent.touch();
            file::read(agent, &request(&frame)?, writer).await
        }
        FrameType::FILE_WRITE_REQ => {
            agent.touch();
            file::write(agent, &request(&frame)?, reader, writer).await
        }
        FrameType::FILE_STAT_REQ => file::stat(agent, &request(&frame)?, writer).await,
        FrameType::FILE_LS_REQ => file::list(agent, &request(&frame)?, writer).await,
        FrameType::ARCHIVE_READ_REQ => {
            agent.touch();
            file::read_archive(agent, &request(&frame)?, writer).await
        }
        FrameType::ARCHIVE_WRITE_REQ => {
            agent.touch();
            file::write_archive(agent, &request(&frame)?, reader, writer).await
        }
        FrameType::FILE_WATCH_REQ => file::watch(agent, &request(&frame)?, reader, writer).await,
        FrameType::TREE_WATCH_REQ => {
            file::watch_tree(agent, &request(&frame)?, reader, writer).await
        }
        FrameType::ENTRY_REQ => file::entries(agent, &request(&frame)?, writer).await,
        FrameType::PLACE_REQ => file::place(agent, &request(&frame)?, writer).await,
        FrameType::EVENTS_REQ => events(agent, reader, writer).await,
        FrameType::EXEC_LIST_REQ => list_sessions(agent, &frame, writer).await,
        FrameType::ACTIVITY_REQ => {
            Ok(writer.send_json(FrameType::ACTIVITY_RESP, &agent.activity()).await?)
        }
        FrameType::LOAD_REQ => Ok(writer.send_json(FrameType::LOAD_RESP, &load(agent)).await?),
        FrameType::IDENTITY_REQ => {
            let report = settings::assume(agent, &request::<Identity>(&frame)?).await;
            Ok(writer.send_json(FrameType::IDENTITY_RESP, &report).await?)
        }
        _ => {
            simple(agent, &frame).await?;
            writer.send(FrameType::EXIT, &exit_payload(0)).await.map_err(host_gone)?;
            if frame.frame_type == FrameType::SHUTDOWN_REQ {
                agent.ask_for_shutdown();
            }
            Ok(())
        }
    }
}

/// Sends the list of sessions. The original's request has no payload.
async fn list_sessions<T: Transport>(
    agent: &Agent,
    frame: &Frame,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let in_full = !frame.payload.is_empty() && request::<ListRequest>(frame)?.in_full;
    if !in_full {
        return Ok(writer.send_json(FrameType::EXEC_LIST_RESP, &agent.sessions.list()).await?);
    }
    for sessions in agent.sessions.all().chunks(SESSIONS_PER_FRAME) {
        let infos: Vec<_> = sessions.iter().map(|session| session.info_in_full()).collect();
        writer.send_json(FrameType::EXEC_LIST_RESP, &infos).await?;
    }
    writer.send(FrameType::EXIT, &exit_payload(0)).await.map_err(host_gone)
}

/// Performs operations that are answered by `EXIT` 0 when they are done.
async fn simple(agent: &Rc<Agent>, frame: &Frame) -> Result<(), OpError> {
    if matches!(
        frame.frame_type,
        FrameType::FILE_MKDIR_REQ | FrameType::FILE_REMOVE_REQ | FrameType::FILE_RENAME_REQ
    ) {
        // A write to a frozen volume blocks until the volume is thawed. Waiting here occupies no
        // worker thread.
        agent.awake().await;
    }
    match frame.frame_type {
        FrameType::EXEC_KILL => {
            let wanted: SessionRef =
                frame.json().map_err(|_| refused(ErrorKind::BadRequest, "bad kill request"))?;
            session::kill(agent, &wanted.session_id)
        }
        FrameType::SIGNAL_REQ => exec::signal(agent, &request(frame)?),
        FrameType::FILE_MKDIR_REQ => file::mkdir(agent, &request::<MkdirRequest>(frame)?).await,
        FrameType::FILE_REMOVE_REQ => file::remove(agent, &request::<RemoveRequest>(frame)?).await,
        FrameType::FILE_RENAME_REQ => file::rename(agent, &request::<RenameRequest>(frame)?).await,
        FrameType::CONFIG_REQ => settings::configure(agent, &request(frame)?).await,
        FrameType::INIT_REQ => {
            settings::start_init_of(agent, &request::<GuestInit>(frame)?.script);
            Ok(())
        }
        FrameType::SUSPEND_REQ => suspend::suspend(agent, &request(frame)?).await,
        FrameType::WOKEN_REQ => {
            suspend::wake(agent, &request(frame)?);
            Ok(())
        }
        FrameType::SHUTDOWN_REQ => Ok(()),
        unknown => {
            Err(refused(ErrorKind::BadRequest, format!("unexpected frame type {unknown}")).into())
        }
    }
}

fn request<R: DeserializeOwned>(frame: &Frame) -> Result<R, AgentError> {
    frame.json().map_err(|error| bad_json("bad request", &error))
}

/// Whether the host understands refusals in detail.
fn wants_details(frame: &Frame) -> bool {
    #[derive(Deserialize)]
    struct Wish {
        #[serde(default)]
        error_details: bool,
    }
    frame.json().is_ok_and(|wish: Wish| wish.error_details)
}

/// Sends events until the host goes away.
async fn events<T: Transport>(
    agent: &Agent,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let mut events = agent.events.subscribe();
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            _ = reader.next() => return Ok(()),
        };
        // A listener that is too slow misses some events and continues with the rest.
        if let Ok(event) = event {
            writer.send_json(FrameType::EVENT, &event).await?;
        }
    }
}
