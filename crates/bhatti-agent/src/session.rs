//! Sessions: processes that survive their client.

use std::time::Duration;

use bhatti_proto::{ExecRequest, FrameType, SessionInfo, SessionRef, SignalRequest};

use crate::{AgentClient, CallError, ExecControl, ExecEvent, ExecInput, ExecOutput, expect_soon};

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
            self.position += bytes.len() as u64;
        }
        Ok(event)
    }

    /// Returns the offset of the next byte of a job's output.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.position
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

    /// Follows a job's output beside its client, starting at byte `from`.
    ///
    /// # Errors
    ///
    /// Returns an error if the session does not exist, or if it has a terminal.
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
            SessionOutput { output: ExecOutput { reader, first: None, _held: None }, position },
        ))
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
