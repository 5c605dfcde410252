//! A command that runs in the guest.

use std::time::Duration;

use bhatti_proto::{
    CHUNK_BYTES, CONTROL_PORT, ExecRequest, Frame, FrameType, PIECE_BYTES_MAX, SendJsonError,
    SignalRequest, parse_exit, parse_exit_signal,
};
use bytes::Bytes;

use crate::{AgentClient, CallError, Reader, Writer, next, refusal};

/// The number of SIGKILL, which no process survives.
const SIGKILL: u8 = 9;

/// An event of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// Bytes that the command wrote to its standard output, or to its terminal.
    Stdout(Bytes),
    /// Bytes that the command wrote to its standard error.
    Stderr(Bytes),
    /// The command reached its time limit. The exit follows.
    TimedOut,
    /// The command ended with this exit code. Nothing follows.
    Exit(i32),
}

/// The most that [`AgentClient::run`] collects, in bytes.
const RUN_BYTES_MAX: usize = 16 << 20;

impl AgentClient {
    /// Starts a command, with pipes for its standard streams. The first event of the output, or
    /// its error, tells whether the command started. Dropping both halves kills the command.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be reached or the request fits in no frame.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves no command behind.
    pub async fn exec(&self, request: ExecRequest) -> Result<(ExecInput, ExecOutput), CallError> {
        self.exec_with_input(request, None).await
    }

    /// Like [`exec`](Self::exec). If `whole_input` is given, it is sent together with the
    /// request, and the command's input ends after it. Meant for short input.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`exec`](Self::exec).
    pub async fn exec_with_input(
        &self,
        mut request: ExecRequest,
        whole_input: Option<&[u8]>,
    ) -> Result<(ExecInput, ExecOutput), CallError> {
        let exec_id = format!("{:016x}", getrandom::u64().map_err(|_| CallError::Entropy)?);
        request.error_details = true;
        request.exec_id = Some(exec_id.clone());
        let (mut reader, mut writer) = self.open(CONTROL_PORT).await?;
        reader.frames.limit_payload(PIECE_BYTES_MAX);
        writer.queue_json(FrameType::EXEC_REQ, &request).map_err(CallError::Send)?;
        if let Some(bytes) = whole_input {
            for chunk in bytes.chunks(CHUNK_BYTES) {
                writer.queue(FrameType::STDIN, chunk).map_err(CallError::Write)?;
            }
            writer.queue(FrameType::STDIN_EOF, &[]).map_err(CallError::Write)?;
        }
        writer.flush().await.map_err(|error| CallError::Send(SendJsonError::Send(error)))?;
        let half_close = self.channel.carries_half_close();
        let ended = half_close && whole_input.is_some();
        if ended {
            writer.shutdown().await.map_err(CallError::Write)?;
        }
        let target = SignalRequest { exec_id: Some(exec_id), ..SignalRequest::default() };
        let control = ExecControl { client: self.clone(), target };
        let input = ExecInput { control, writer, half_close, ended };
        Ok((input, ExecOutput { reader, first: None, signal: None, _held: None }))
    }

    /// Runs a command to its end. Returns its exit code and its output, at most 16 MiB.
    ///
    /// # Errors
    ///
    /// Returns an error if the command cannot be started, if the connection is lost, or if the
    /// output is longer.
    pub async fn run(&self, request: ExecRequest) -> Result<(i32, Vec<u8>, Vec<u8>), CallError> {
        let (_input, mut output) = self.exec_with_input(request, Some(&[])).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match output.next().await? {
                ExecEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                ExecEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                ExecEvent::TimedOut => {}
                ExecEvent::Exit(code) => return Ok((code, stdout, stderr)),
            }
            if stdout.len() + stderr.len() > RUN_BYTES_MAX {
                return Err(CallError::TooMuch { limit: RUN_BYTES_MAX, what: "bytes of output" });
            }
        }
    }
}

/// The input of a command or session.
pub struct ExecInput {
    pub(crate) control: ExecControl,
    pub(crate) writer: Writer,
    /// Whether the end of the input also closes our direction of the connection, for agents that
    /// do not know [`FrameType::STDIN_EOF`].
    pub(crate) half_close: bool,
    /// Whether our direction of the connection is closed.
    pub(crate) ended: bool,
}

/// Control over a command or session, on a stream beside its input.
#[derive(Clone)]
pub struct ExecControl {
    pub(crate) client: AgentClient,
    pub(crate) target: SignalRequest,
}

impl ExecControl {
    /// Signals the process group, even if the process has not read all of its input.
    ///
    /// # Errors
    ///
    /// Returns an error if the command has ended, or if the agent is not reachable.
    pub async fn signal(&self, signal: u8) -> Result<(), CallError> {
        let request = SignalRequest { signal, error_details: true, ..self.target.clone() };
        self.client.act_soon(FrameType::SIGNAL_REQ, &request).await
    }
}

impl ExecInput {
    /// Writes to the standard input. Waits while the command does not read.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.send(FrameType::STDIN, chunk).await?;
        }
        Ok(())
    }

    /// Ends the standard input.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn end(&mut self) -> Result<(), CallError> {
        self.send(FrameType::STDIN_EOF, &[]).await?;
        if self.half_close {
            self.ended = true;
            self.writer.shutdown().await.map_err(CallError::Write)?;
        }
        Ok(())
    }

    /// Sets the size of the terminal.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn resize(&mut self, rows: u16, cols: u16) -> Result<(), CallError> {
        self.send(FrameType::RESIZE, &bhatti_proto::resize_payload(rows, cols)).await
    }

    /// Returns the control over the command or session.
    #[must_use]
    pub fn control(&self) -> ExecControl {
        self.control.clone()
    }

    /// Signals the process group, like [`ExecControl::signal`].
    ///
    /// # Errors
    ///
    /// Returns an error if the command has ended, or if the agent is not reachable.
    pub async fn signal(&mut self, signal: u8) -> Result<(), CallError> {
        self.control.signal(signal).await
    }

    /// Kills the process group. A session with a terminal gets `SIGTERM` instead.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn kill(&mut self) -> Result<(), CallError> {
        if self.ended {
            return self.control.signal(SIGKILL).await;
        }
        self.send(FrameType::KILL, &[]).await
    }

    async fn send(&mut self, frame_type: FrameType, payload: &[u8]) -> Result<(), CallError> {
        self.writer.send(frame_type, payload).await.map_err(CallError::Write)
    }
}

/// The output of a command.
pub struct ExecOutput {
    pub(crate) reader: Reader,
    pub(crate) first: Option<ExecEvent>,
    /// The signal that ended a session's process.
    pub(crate) signal: Option<u8>,
    pub(crate) _held: Option<Box<dyn Send + Sync>>,
}

impl ExecOutput {
    /// Keeps `held` alive until the output is dropped.
    #[must_use]
    pub fn holding(self, held: impl Send + Sync + 'static) -> Self {
        Self { _held: Some(Box::new(held)), ..self }
    }

    /// Waits until the command runs, with agents that report the start. This tells a guest that
    /// hangs from a command that writes nothing.
    ///
    /// # Errors
    ///
    /// Returns [`CallError::Agent`] if the command could not be started, and
    /// [`CallError::Silent`] if the guest sends nothing on any stream for `limit`. Returns
    /// [`CallError::Busy`] if the guest only answers other requests.
    pub async fn started(&mut self, limit: Duration) -> Result<(), CallError> {
        let heard = self.reader.heard.clone();
        let started = async {
            let frame = next(&mut self.reader).await?;
            if let Some(error) = refusal(&frame) {
                return Err(error);
            }
            if frame.frame_type != FrameType::STARTED {
                self.first = Some(event(&frame)?.ok_or(CallError::Unexpected)?);
            }
            Ok(())
        };
        heard.within(limit, started).await
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// Returns [`CallError::Agent`] if the command could not be started, and [`CallError::Lost`]
    /// if the connection ended before the command.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<ExecEvent, CallError> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        loop {
            let frame = next(&mut self.reader).await?;
            if let Some(error) = refusal(&frame) {
                return Err(error);
            }
            if frame.frame_type == FrameType::EXIT {
                self.signal = parse_exit_signal(&frame.payload);
            }
            // Ignore the frame types that only a newer agent knows.
            if let Some(event) = event(&frame)? {
                return Ok(event);
            }
        }
    }
}

fn event(frame: &Frame) -> Result<Option<ExecEvent>, CallError> {
    Ok(Some(match frame.frame_type {
        FrameType::STDOUT => ExecEvent::Stdout(frame.payload.clone()),
        FrameType::STDERR => ExecEvent::Stderr(frame.payload.clone()),
        FrameType::TIMEOUT => ExecEvent::TimedOut,
        FrameType::EXIT => {
            ExecEvent::Exit(parse_exit(&frame.payload).ok_or(CallError::Unexpected)?)
        }
        _ => return Ok(None),
    }))
}
