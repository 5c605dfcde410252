//! Sessions: processes that survive their client.

use std::time::Duration;

use bhatti_proto::{
    CHUNK_BYTES, ExecRequest, FrameType, InputEnd, ListRequest, PIECE_BYTES_MAX, SessionInfo,
    SessionRef, SignalRequest, TAKEN_OVER, resize_payload,
};

use crate::{
    ANSWER_LIMIT, AgentClient, CallError, ExecControl, ExecEvent, ExecInput, ExecOutput, Reader,
    Writer, expect, expect_soon, next, refusal,
};

/// The most sessions that a list has: an agent keeps fewer.
const SESSIONS_MAX: usize = 10_000;

/// The output of a session, with the position in it. Dropping it together with the input
/// detaches.
pub struct SessionOutput {
    output: ExecOutput,
    position: u64,
}

impl SessionOutput {
    /// Waits for the next event. [`ExecEvent::Exit`] has the process's exit code, or 0 if another
    /// client took over the session.
    ///
    /// # Errors
    ///
    /// Returns [`CallError::Lost`] if the connection ended: attach again, from
    /// [`position`](Self::position).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<ExecEvent, CallError> {
        let event = self.output.next().await?;
        if let ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) = &event {
            self.position = self.position.saturating_add(bytes.len() as u64);
        }
        Ok(event)
    }

    /// Returns the signal that ended the process, after [`ExecEvent::Exit`]. `None` if the process
    /// exited by itself, or if the agent is older.
    #[must_use]
    pub fn signal(&self) -> Option<u8> {
        self.output.signal.filter(|signal| *signal != TAKEN_OVER)
    }

    /// Whether [`ExecEvent::Exit`] means that another client took over the session. Older agents do
    /// not say so.
    #[must_use]
    pub fn was_taken_over(&self) -> bool {
        self.output.signal == Some(TAKEN_OVER)
    }

    /// Returns the offset of the next byte of a job's output.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.position
    }
}

/// Input for a session, beside its client.
pub struct SessionInput {
    reader: Reader,
    writer: Writer,
}

impl SessionInput {
    /// Sends input. Waits while the process does not read.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.writer.send(FrameType::STDIN, chunk).await.map_err(CallError::Write)?;
        }
        Ok(())
    }

    /// Sets the size of the terminal.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn resize(&mut self, rows: u16, cols: u16) -> Result<(), CallError> {
        let payload = resize_payload(rows, cols);
        self.writer.send(FrameType::RESIZE, &payload).await.map_err(CallError::Write)
    }

    /// Waits until the agent has taken all input.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn finish(mut self) -> Result<(), CallError> {
        self.writer.send(FrameType::STDIN_EOF, &[]).await.map_err(CallError::Write)?;
        expect(&mut self.reader, FrameType::EXIT).await.map(drop)
    }
}

impl AgentClient {
    /// Creates a session and attaches to it: a terminal if the request has `tty`, otherwise a
    /// job, whose output is kept.
    ///
    /// # Errors
    ///
    /// Returns an error if the command cannot be started or there are too many sessions.
    pub async fn create_session(
        &self,
        request: ExecRequest,
    ) -> Result<(SessionInfo, ExecInput, SessionOutput), CallError> {
        self.session(ExecRequest { session: true, detach: false, session_id: None, ..request })
            .await
    }

    /// Starts a job, or a session with a terminal, without a client.
    ///
    /// # Errors
    ///
    /// Returns an error if the command cannot be started or there are too many sessions.
    pub async fn create_detached(&self, request: ExecRequest) -> Result<SessionInfo, CallError> {
        let request = ExecRequest {
            session: true,
            detach: true,
            error_details: true,
            session_id: None,
            ..request
        };
        self.ask(FrameType::EXEC_REQ, &request, FrameType::SESSION_INFO).await
    }

    /// Attaches to a session, and takes it over from another client. A job's output starts at
    /// byte `from`, or at the first byte that is kept. A terminal first replays its scrollback.
    ///
    /// # Errors
    ///
    /// Returns an error if the session does not exist.
    pub async fn attach(
        &self,
        session_id: &str,
        from: Option<u64>,
    ) -> Result<(SessionInfo, ExecInput, SessionOutput), CallError> {
        let session_id = Some(session_id.to_owned());
        self.session(ExecRequest { session_id, output_offset: from, ..ExecRequest::default() })
            .await
    }

    /// Follows a session's output beside its client, starting at byte `from`, or at the end if
    /// `from` is beyond it.
    ///
    /// # Errors
    ///
    /// Returns an error if the session does not exist.
    pub async fn observe(
        &self,
        session_id: &str,
        from: Option<u64>,
    ) -> Result<(SessionInfo, ExecInput, SessionOutput), CallError> {
        let session_id = Some(session_id.to_owned());
        self.session(ExecRequest {
            session_id,
            output_offset: from,
            observe: true,
            ..ExecRequest::default()
        })
        .await
    }

    async fn session(
        &self,
        request: ExecRequest,
    ) -> Result<(SessionInfo, ExecInput, SessionOutput), CallError> {
        let request = ExecRequest { error_details: true, ..request };
        let (mut reader, writer) = self.request(FrameType::EXEC_REQ, &request).await?;
        reader.frames.limit_payload(PIECE_BYTES_MAX);
        let frame = expect_soon(&mut reader, FrameType::SESSION_INFO).await?;
        let info: SessionInfo = frame.json().map_err(|_| CallError::Unexpected)?;
        let target =
            SignalRequest { session_id: Some(info.session_id.clone()), ..SignalRequest::default() };
        let first = info.output_start.unwrap_or_default();
        let position = request
            .output_offset
            .unwrap_or(first)
            .clamp(first, info.output_end.unwrap_or(u64::MAX));
        // The agent takes the end of this connection as the client's detaching.
        let control = ExecControl { client: self.clone(), target };
        let input = ExecInput { control, writer, half_close: false, ended: false };
        Ok((
            info,
            input,
            SessionOutput {
                output: ExecOutput { reader, first: None, signal: None, _held: None },
                position,
            },
        ))
    }

    /// Begins to send input to a session beside its client.
    ///
    /// # Errors
    ///
    /// Returns an error if the session does not exist, or if it takes no input.
    pub async fn send_input(
        &self,
        session: &str,
        end: InputEnd,
    ) -> Result<SessionInput, CallError> {
        let request = ExecRequest {
            session_id: Some(session.to_owned()),
            input: Some(end),
            error_details: true,
            ..ExecRequest::default()
        };
        let (mut reader, writer) = self.request(FrameType::EXEC_REQ, &request).await?;
        expect_soon(&mut reader, FrameType::SESSION_INFO).await?;
        Ok(SessionInput { reader, writer })
    }

    /// Returns all sessions with their tags and notes, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent does not answer.
    pub async fn list_sessions_in_full(&self) -> Result<Vec<SessionInfo>, CallError> {
        let request = ListRequest { in_full: true };
        let (mut reader, _writer) = self.request(FrameType::EXEC_LIST_REQ, &request).await?;
        let heard = reader.heard.clone();
        let list = async {
            let mut sessions = Vec::new();
            loop {
                let frame = next(&mut reader).await?;
                match frame.frame_type {
                    FrameType::EXEC_LIST_RESP if sessions.len() < SESSIONS_MAX => {
                        let more: Vec<SessionInfo> =
                            frame.json().map_err(|_| CallError::Unexpected)?;
                        sessions.extend(more);
                    }
                    FrameType::EXIT => return Ok(sessions),
                    _ => return Err(refusal(&frame).unwrap_or(CallError::Unexpected)),
                }
            }
        };
        heard.within(ANSWER_LIMIT, list).await
    }

    /// Returns all sessions, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent does not answer.
    pub async fn list_sessions(&self) -> Result<Vec<SessionInfo>, CallError> {
        let (mut reader, _writer) = self.bare_request(FrameType::EXEC_LIST_REQ).await?;
        expect_soon(&mut reader, FrameType::EXEC_LIST_RESP)
            .await?
            .json()
            .map_err(|_| CallError::Unexpected)
    }

    /// Asks a session to end by its stop signal, and has the agent kill what is left of it after
    /// `grace`. Returns once the signal is sent.
    ///
    /// # Errors
    ///
    /// Returns an error if the session does not exist.
    pub async fn stop_session(&self, session_id: &str, grace: Duration) -> Result<(), CallError> {
        let request = SignalRequest {
            session_id: Some(session_id.to_owned()),
            kill_after_ms: Some(grace.as_millis().try_into().unwrap_or(u64::MAX)),
            error_details: true,
            ..SignalRequest::default()
        };
        self.act_soon(FrameType::SIGNAL_REQ, &request).await
    }

    /// Returns a session. It may be named by `pid:` and its process id, or `tag:` and its tag.
    ///
    /// # Errors
    ///
    /// Returns an error if the session does not exist.
    pub async fn find_session(&self, session: &str) -> Result<SessionInfo, CallError> {
        let request = ExecRequest {
            session_id: Some(session.to_owned()),
            observe: true,
            output_offset: Some(u64::MAX),
            error_details: true,
            ..ExecRequest::default()
        };
        self.ask(FrameType::EXEC_REQ, &request, FrameType::SESSION_INFO).await
    }

    /// Signals a session's process group. SIGKILL goes to every process of the session.
    ///
    /// # Errors
    ///
    /// Returns an error if the session or the signal does not exist.
    pub async fn signal_session(&self, session: &str, signal: u8) -> Result<(), CallError> {
        let request = SignalRequest {
            session_id: Some(session.to_owned()),
            signal,
            error_details: true,
            ..SignalRequest::default()
        };
        self.act_soon(FrameType::SIGNAL_REQ, &request).await
    }

    /// Kills a session's process. If a job has ended already, the agent removes the job.
    ///
    /// # Errors
    ///
    /// Returns an error if the session does not exist.
    pub async fn kill_session(&self, session_id: &str) -> Result<(), CallError> {
        self.act_soon(
            FrameType::EXEC_KILL,
            &SessionRef { session_id: session_id.to_owned(), error_details: true },
        )
        .await
    }
}
