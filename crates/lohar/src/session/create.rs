//! Creates sessions.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bhatti_proto::{AgentError, ErrorKind, ExecRequest, FrameType};
use rustix::process::Signal;
use tokio::io::Interest;
use tokio::sync::{Notify, Semaphore, mpsc};

use super::job_log::JobLog;
use super::output::Output;
use super::pump::{self, Source};
use super::{Attachment, INIT_ID, Session, attach, kept};
use crate::Agent;
use crate::agent::unix_now;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::input;
use crate::launch;
use crate::limits::{JOB_OUTPUT_BYTES_MAX, NOTE_BYTES_MAX, TAG_BYTES_MAX, TERM_GRACE};
use crate::log;
use crate::processes::{Confinement, Processes};
use crate::reaper::Exit;
use crate::refusal::{OpError, kind_of, refused};
use crate::ring::Ring;
use crate::watched::watch;

/// The most of a command that is listed, in bytes. With six bytes of JSON for each of these, the
/// 576 sessions of [`Limits`](crate::limits::Limits) have 675 KiB: a list of all sessions fits in
/// one frame.
const LISTED_BYTES_MAX: usize = 200;

/// Serves an `EXEC_REQ` for a new session, with a terminal or without one.
pub(crate) async fn serve_create<T: Transport>(
    agent: &Rc<Agent>,
    request: &ExecRequest,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    check_names(request)?;
    let session = if request.restart {
        create_kept(agent, request).await?
    } else {
        create(agent, request, None)?
    };
    if request.detach {
        writer.send_json(FrameType::SESSION_INFO, &session.info_in_full()).await?;
        session.watch_idleness(0);
        return Ok(());
    }
    attach::serve(agent, &session, request, reader, writer).await
}

/// Refuses a tag or a note that is too long.
fn check_names(request: &ExecRequest) -> Result<(), AgentError> {
    for (what, text, limit) in
        [("tag", &request.tag, TAG_BYTES_MAX), ("note", &request.note, NOTE_BYTES_MAX)]
    {
        let bytes = text.as_ref().map_or(0, String::len);
        if bytes > limit {
            let message = format!("the {what} has {bytes} bytes: the limit is {limit}");
            return Err(refused(ErrorKind::BadRequest, message));
        }
    }
    Ok(())
}

/// Starts the guest's init script.
pub(crate) fn start_init(agent: &Rc<Agent>, script: &str) {
    let request = ExecRequest {
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
        tty: Some(true),
        ..ExecRequest::default()
    };
    if let Err(error) = create(agent, &request, Some(INIT_ID)) {
        log::line(format_args!("failed to start the init script: {}", error.message));
    }
}

/// Creates a job that starts again when the guest boots anew.
async fn create_kept(agent: &Rc<Agent>, request: &ExecRequest) -> Result<Rc<Session>, OpError> {
    if request.tty == Some(true) || !request.detach {
        let message = "only a detached job without a terminal can start again with the guest";
        return Err(refused(ErrorKind::BadRequest, message).into());
    }
    let number = agent.sessions.admit(&agent.limits, false)?;
    let id = format!("s{number}");
    kept::keep(agent, &id, request).await?;
    // A child that starts while the users' processes are frozen would freeze before it executes
    // its program, and the agent would block with it.
    agent.awake().await;
    match start_job(agent, request, id.clone()) {
        Ok(session) => {
            agent.sessions.insert(number, &session);
            Ok(session)
        }
        Err(error) => {
            kept::forget(agent, &id).await;
            Err(error.into())
        }
    }
}

/// Starts a job again, under the number that it had before the guest booted.
pub(super) fn start_again(
    agent: &Rc<Agent>,
    number: u64,
    request: &ExecRequest,
) -> Result<(), AgentError> {
    agent.sessions.reserve(number);
    let session = start_job(agent, request, format!("s{number}"))?;
    agent.sessions.insert(number, &session);
    Ok(())
}

fn create(
    agent: &Rc<Agent>,
    request: &ExecRequest,
    id: Option<&str>,
) -> Result<Rc<Session>, AgentError> {
    let number = agent.sessions.admit(&agent.limits, request.tty == Some(true))?;
    let id = id.map_or_else(|| format!("s{number}"), str::to_owned);
    let session = if request.tty == Some(true) {
        start_terminal(agent, request, id)?
    } else {
        start_job(agent, request, id)?
    };
    agent.sessions.insert(number, &session);
    Ok(session)
}

fn start_terminal(
    agent: &Rc<Agent>,
    request: &ExecRequest,
    id: String,
) -> Result<Rc<Session>, AgentError> {
    let launch::OnTerminal { processes, exit, master } = launch::on_terminal(agent, request)?;
    let watched = watch(master, Interest::READABLE | Interest::WRITABLE);
    let terminal =
        Rc::new(watched.map_err(|error| refused(kind_of(&error), format!("pty: {error}")))?);
    let (stdin, queued) = mpsc::unbounded_channel();
    tokio::task::spawn_local(pump::feed_terminal(Rc::clone(&terminal), queued));
    let sources = [Source::Terminal(Rc::clone(&terminal)), Source::Ended];
    let output = Output::Ring(Ring::default());
    Ok(begin(
        agent,
        request,
        Begin { id, terminal: Some(terminal), stdin, output, processes, exit, sources },
    ))
}

fn start_job(
    agent: &Rc<Agent>,
    request: &ExecRequest,
    id: String,
) -> Result<Rc<Session>, AgentError> {
    let limit =
        request.output_limit.unwrap_or(agent.limits.job_output_bytes).min(JOB_OUTPUT_BYTES_MAX);
    let log = JobLog::create(&agent.state_dir, &id, limit)
        .map_err(|error| refused(kind_of(&error), format!("start: job output: {error}")))?;
    let launch::Piped { processes, exit, stdin, stdout, stderr } =
        launch::piped(agent, request, Confinement::Own)?;
    let (sender, queued) = mpsc::unbounded_channel();
    tokio::task::spawn_local(input::feed(stdin, queued));
    let sources =
        [Source::Pipe(stdout, FrameType::STDOUT), Source::Pipe(stderr, FrameType::STDERR)];
    let output = Output::Log(log);
    Ok(begin(
        agent,
        request,
        Begin { id, terminal: None, stdin: sender, output, processes, exit, sources },
    ))
}

/// Returns a command as lists show it: joined by single spaces, and cut off if it is long. A list
/// of all sessions has to fit in one frame.
fn listed(argv: &[String]) -> String {
    let mut listed = argv.join(" ");
    if listed.len() > LISTED_BYTES_MAX {
        listed.truncate(listed.floor_char_boundary(LISTED_BYTES_MAX));
        listed.push('…');
        listed.shrink_to_fit();
    }
    listed
}

struct Begin {
    id: String,
    terminal: Option<pump::Terminal>,
    stdin: pump::StdinSender,
    output: Output,
    processes: Rc<Processes>,
    exit: Exit,
    sources: [Source; 2],
}

fn begin(agent: &Rc<Agent>, request: &ExecRequest, begin: Begin) -> Rc<Session> {
    let Begin { id, terminal, stdin, output, processes, exit, sources } = begin;
    // A job that starts detached has no client that could send input.
    let stdin = (!request.detach || terminal.is_some()).then_some(stdin);
    let session = Rc::new(Session {
        id,
        argv: listed(&request.argv),
        terminal,
        created_at: unix_now(),
        processes,
        restarts: request.restart,
        stop_signal: request
            .stop_signal
            .and_then(|number| input::named_signal(&[number]))
            .unwrap_or(Signal::TERM),
        kill: RefCell::default(),
        max_idle_sec: request
            .max_idle_sec
            .and_then(|seconds| u64::try_from(seconds).ok())
            .filter(|s| *s > 0),
        stdin: RefCell::new(stdin),
        room: Arc::new(Semaphore::new(input::STDIN_QUEUE_BYTES)),
        output: RefCell::new(output),
        end: Cell::new(None),
        tag: request.tag.clone(),
        note: request.note.clone(),
        attachment: RefCell::new(Attachment::default()),
        changed: Notify::new(),
    });
    if let Some(timeout_ms) = request.timeout_ms {
        let timed = Rc::clone(&session);
        tokio::task::spawn_local(async move {
            let limit = Duration::from_millis(timeout_ms);
            tokio::select! {
                () = tokio::time::sleep(limit) => timed.stop(timed.stop_signal, TERM_GRACE),
                () = timed.ended() => {}
            }
        });
    }
    tokio::task::spawn_local(pump::run(Rc::clone(agent), Rc::clone(&session), sources, exit));
    session
}
