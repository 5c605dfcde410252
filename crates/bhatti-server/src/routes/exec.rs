//! `/sandboxes/{sandbox}/exec`: runs a command, and returns its output at once or line by line.

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bhatti_agent::{CallError, ExecInput, ExecOutput};
use bhatti_api::{ErrorCode, ExecEvent, ExecRequest, ExecResult, Output, TIMED_OUT};
use bhatti_types::{Environment, UserId};
use bytes::Bytes;
use futures_util::stream;

use crate::AppState;
use crate::answers::{Collected, Part, exec_answer};
use crate::auth::Caller;
use crate::extract::{ApiPath, accepts};
use crate::idempotency::IdempotencyKey;
use crate::json::{ApiJson, Json};
use crate::status::{ApiError, accepted};
use crate::utf8::Utf8Pieces;

pub(super) const NDJSON: &str = "application/x-ndjson";

/// Maximum length of input that is sent together with the command, in bytes. It fits the window
/// of its stream, so that the daemon never waits for a guest that does not read.
const SHORT_INPUT_BYTES: usize = 64 * 1024;

/// Maximum length of each output stream in a buffered response, in bytes.
const BUFFERED_BYTES_MAX: usize = 10 << 20;

/// Minimum growth of an output buffer, in bytes.
const GROWTH_BYTES: usize = 256 << 10;

/// Runs a command.
///
/// The response contains all of the command's output. With `Accept: application/x-ndjson`, the
/// response streams a line for each piece of output. With `detach`, the command runs as a job,
/// and the response comes at once.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/exec", tag = "exec", params(IdempotencyKey, ("sandbox" = String, Path)), request_body = ExecRequest,
    responses((status = 200, content((ExecResult = "application/json"), (ExecEvent = "application/x-ndjson"))),
        (status = 202, body = bhatti_api::Job, description = "The command runs as a job."), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    headers: HeaderMap,
    ApiJson(request): ApiJson<ExecRequest>,
) -> Result<Response, ApiError> {
    let ExecRequest { env, cwd, stdin, stdin_base64, user, timeout_sec, detach, restart, .. } =
        request;
    let cmd = if request.entrypoint {
        state.control.image_command(owner, &id_or_name, request.cmd)?
    } else {
        request.cmd
    };
    let has_stdin = stdin.is_some() || stdin_base64.is_some();
    let stdin = read_stdin(stdin, stdin_base64);
    let exec = match agent_request(Command { cmd, env, cwd, user, timeout_sec }) {
        Ok(exec) => exec,
        Err(error) => {
            // If the sandbox does not exist, that is the better error.
            state.control.find_id(owner, &id_or_name)?;
            return Err(error);
        }
    };
    if detach {
        if has_stdin {
            return Err(ApiError::new(ErrorCode::BadRequest, "a job has no stdin")
                .hint("write the input into a file first, or run the command without detach"));
        }
        let exec = bhatti_proto::ExecRequest { restart, ..exec };
        return start_job(&state, owner, &id_or_name, exec).await;
    }
    if restart {
        return Err(ApiError::new(ErrorCode::BadRequest, "only a job can restart")
            .hint(r#"start a job: {"cmd": ["./server"], "detach": true, "restart": true}"#));
    }
    let stdin = stdin?;
    let (at_hand, rest) =
        if stdin.len() <= SHORT_INPUT_BYTES { (Some(stdin), None) } else { (None, Some(stdin)) };
    let (input, output) = state.control.exec(owner, &id_or_name, exec, at_hand.as_deref()).await?;
    if accepts(&headers, NDJSON) {
        return Ok(lines(input, output, rest));
    }
    // A command may end without reading its input. The input half lives until then, because
    // dropping it kills the command.
    let feed_on = async {
        let _input = feed(input, rest).await;
        std::future::pending::<()>().await;
    };
    let mut part = state.answers.part(owner);
    let collected = tokio::select! {
        collected = collect(output, &mut part) => collected,
        () = feed_on => return Err(ApiError::new(ErrorCode::Internal, "the input ended the command")),
    };
    Ok(exec_answer(collected?, part))
}

/// Returns the input of a command.
fn read_stdin(text: Option<String>, base64: Option<String>) -> Result<Vec<u8>, ApiError> {
    match (text, base64) {
        (text, None) => Ok(text.unwrap_or_default().into_bytes()),
        (None, Some(base64)) => STANDARD.decode(base64).map_err(|error| {
            let message = format!("stdin_base64 is not base64 with padding: {error}");
            ApiError::new(ErrorCode::BadRequest, message)
        }),
        (Some(_), Some(_)) => {
            let message = "stdin and stdin_base64 are both given";
            Err(ApiError::new(ErrorCode::BadRequest, message).hint("leave one of them out"))
        }
    }
}

/// Starts a job: a command that runs without a client.
async fn start_job(
    state: &AppState,
    owner: UserId,
    id_or_name: &str,
    exec: bhatti_proto::ExecRequest,
) -> Result<Response, ApiError> {
    let restart = exec.restart;
    let used = state.control.enter(owner, id_or_name).await?;
    let info = used.agent.create_detached(exec).await?;
    if restart && !info.restart {
        // A guest agent of an older version, which keeps running with its sandbox, does not know
        // `restart`.
        used.agent.kill_session(&info.session_id).await?;
        return Err(ApiError::new(
            ErrorCode::WrongState,
            "the sandbox's guest agent is too old to restart a job",
        )
        .hint("boot the sandbox again: bhatti stop NAME, then bhatti start --cold-boot NAME"));
    }
    let job = super::jobs::job(info);
    let job = job.ok_or_else(|| ApiError::new(ErrorCode::Internal, "the job got a terminal"))?;
    Ok(accepted(Json(job)))
}

/// A command to run.
#[derive(Debug, Default)]
pub(crate) struct Command {
    pub(crate) cmd: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) cwd: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) timeout_sec: Option<u32>,
}

/// Checks a command and converts it into the guest agent's request.
pub(crate) fn agent_request(command: Command) -> Result<bhatti_proto::ExecRequest, ApiError> {
    let Command { cmd, env, cwd, user, timeout_sec } = command;
    if cmd.first().is_none_or(String::is_empty) {
        return Err(ApiError::new(ErrorCode::BadRequest, "cmd required")
            .hint(r#"name a program and its arguments: {"cmd": ["echo", "hi"]}"#));
    }
    if timeout_sec == Some(0) {
        return Err(ApiError::new(ErrorCode::BadRequest, "timeout_sec must be at least 1"));
    }
    let env = Environment::try_from(env).map_err(|error| ApiError::bad_request(&error))?.into_map();
    let timeout_ms = timeout_sec.map(|seconds| u64::from(seconds) * 1000);
    Ok(bhatti_proto::ExecRequest { argv: cmd, env, cwd, user, timeout_ms, ..Default::default() })
}

/// Writes the rest of the input to the command. Errors are ignored: if the command has closed its
/// input or has ended, its output shows that.
async fn feed(mut input: ExecInput, rest: Option<Vec<u8>>) -> ExecInput {
    if let Some(stdin) = rest
        && input.write(&stdin).await.is_ok()
    {
        drop(input.end().await);
    }
    input
}

async fn collect(mut output: ExecOutput, part: &mut Part) -> Result<Collected, ApiError> {
    let (mut stdout, mut stderr, mut timed_out) = (Vec::new(), Vec::new(), false);
    loop {
        if !part.grow_to(stdout.len() + stderr.len()) {
            let message = "the memory for buffered responses is in use; the command was killed";
            return Err(ApiError::new(ErrorCode::Busy, message)
                .hint(format!("ask for a stream with `Accept: {NDJSON}`")));
        }
        match output.next().await? {
            bhatti_agent::ExecEvent::Stdout(bytes) => append(&mut stdout, &bytes)?,
            bhatti_agent::ExecEvent::Stderr(bytes) => append(&mut stderr, &bytes)?,
            bhatti_agent::ExecEvent::TimedOut => timed_out = true,
            bhatti_agent::ExecEvent::Exit(exit_code) => {
                let exit_code = if timed_out { TIMED_OUT } else { exit_code };
                return Ok(Collected { exit_code, stdout, stderr });
            }
        }
    }
}

fn append(collected: &mut Vec<u8>, bytes: &[u8]) -> Result<(), ApiError> {
    if collected.len() + bytes.len() > BUFFERED_BYTES_MAX {
        let message = format!(
            "the command wrote more than {BUFFERED_BYTES_MAX} bytes to one stream and was killed"
        );
        return Err(ApiError::new(ErrorCode::OutputTooLarge, message)
            .hint(format!("ask for a stream with `Accept: {NDJSON}`")));
    }
    if collected.capacity() - collected.len() < bytes.len() {
        // Do not double the buffer: the memory budget counts what the buffer holds.
        collected.reserve_exact(bytes.len().max(GROWTH_BYTES));
    }
    collected.extend_from_slice(bytes);
    Ok(())
}

/// Returns a response with a line for each event. If the client disconnects, the command is
/// killed.
fn lines(input: ExecInput, output: ExecOutput, rest: Option<Vec<u8>>) -> Response {
    let feeding = Box::pin(feed(input, rest));
    let state = Lines {
        feeding: Some(feeding),
        _input: None,
        output,
        stdout: Utf8Pieces::default(),
        stderr: Utf8Pieces::default(),
        timed_out: false,
        ended: false,
    };
    let body = stream::unfold(state, |mut state| async move {
        let lines = state.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(lines)), state))
    });
    let headers = [(CONTENT_TYPE.as_str(), NDJSON), ("x-content-type-options", "nosniff")];
    (headers, Body::from_stream(body)).into_response()
}

type Feeding = std::pin::Pin<Box<dyn Future<Output = ExecInput> + Send>>;

struct Lines {
    feeding: Option<Feeding>,
    _input: Option<ExecInput>,
    output: ExecOutput,
    stdout: Utf8Pieces,
    stderr: Utf8Pieces,
    timed_out: bool,
    ended: bool,
}

impl Lines {
    /// Returns the next lines; `None` after the last.
    async fn next(&mut self) -> Option<Vec<u8>> {
        while !self.ended {
            let lines = match self.next_event().await {
                Ok(bhatti_agent::ExecEvent::Stdout(bytes)) => {
                    line(stdout_event(self.stdout.push(&bytes)))
                }
                Ok(bhatti_agent::ExecEvent::Stderr(bytes)) => {
                    line(stderr_event(self.stderr.push(&bytes)))
                }
                Ok(bhatti_agent::ExecEvent::TimedOut) => {
                    self.timed_out = true;
                    Vec::new()
                }
                Ok(bhatti_agent::ExecEvent::Exit(exit_code)) => {
                    let exit_code = if self.timed_out { TIMED_OUT } else { exit_code };
                    self.last(ExecEvent::Exit { exit_code })
                }
                Err(error) => {
                    let ApiError { code, message, .. } = error.into();
                    self.last(ExecEvent::Error { data: message, code })
                }
            };
            // An event that holds only a part of a character gives no line yet.
            if !lines.is_empty() {
                return Some(lines);
            }
        }
        None
    }

    async fn next_event(&mut self) -> Result<bhatti_agent::ExecEvent, CallError> {
        loop {
            let Some(feeding) = &mut self.feeding else { return self.output.next().await };
            tokio::select! {
                event = self.output.next() => return event,
                input = feeding => {
                    self._input = Some(input);
                    self.feeding = None;
                }
            }
        }
    }

    fn last(&mut self, event: ExecEvent) -> Vec<u8> {
        self.ended = true;
        let held =
            [line(stdout_event(self.stdout.finish())), line(stderr_event(self.stderr.finish()))];
        [held.concat(), line(Some(event))].concat()
    }
}

fn stdout_event(bytes: Vec<u8>) -> Option<ExecEvent> {
    let Output { text: data, base64: data_base64 } = some_output(bytes)?;
    Some(ExecEvent::Stdout { data, data_base64 })
}

fn stderr_event(bytes: Vec<u8>) -> Option<ExecEvent> {
    let Output { text: data, base64: data_base64 } = some_output(bytes)?;
    Some(ExecEvent::Stderr { data, data_base64 })
}

fn some_output(bytes: Vec<u8>) -> Option<Output> {
    if bytes.is_empty() { None } else { Some(Output::new(bytes)) }
}

fn line(event: Option<ExecEvent>) -> Vec<u8> {
    let Some(event) = event else { return Vec::new() };
    let mut line = serde_json::to_vec(&event).unwrap_or_default();
    line.push(b'\n');
    line
}
