//! Calls that concern the whole guest.

use std::time::Duration;

use bhatti_proto::{
    ActivityInfo, ExecRequest, FrameType, GuestConfig, GuestEvent, GuestInit, Identity,
    IdentityReport, LoadInfo, Suspend, Woken,
};
use tokio::time::{sleep, timeout};

use crate::{AgentClient, CallError, Reader, Writer, expect};

/// The timeout of one attempt to reach an agent, and the pause between two attempts.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// Events in the guest. Dropping the value ends the stream.
pub struct GuestEvents {
    reader: Reader,
    _writer: Writer,
}

impl GuestEvents {
    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// Returns [`CallError::Lost`] when the connection ends.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<GuestEvent, CallError> {
        expect(&mut self.reader, FrameType::EVENT).await?.json().map_err(|_| CallError::Unexpected)
    }
}

impl AgentClient {
    /// Configures the guest, once after its boot.
    ///
    /// # Errors
    ///
    /// Returns an error if a part of the configuration fails, or if the guest has been configured
    /// before.
    pub async fn configure(&self, config: &GuestConfig) -> Result<(), CallError> {
        self.act(FrameType::CONFIG_REQ, config).await
    }

    /// Starts the guest's init script, which the configuration left out.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable. If the script does not start, the guest's
    /// console names the error.
    pub async fn start_init(&self, script: &str) -> Result<(), CallError> {
        self.act(FrameType::INIT_REQ, &GuestInit { script: script.to_owned() }).await
    }

    /// Waits until the agent is reachable. The next request then arrives at once.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable.
    pub async fn reach(&self) -> Result<(), CallError> {
        // A stream without a request: opening it shows that the agent is reachable.
        let (_reader, mut writer) = self.open(bhatti_proto::CONTROL_PORT).await?;
        writer.flush().await.map_err(CallError::Write)
    }

    /// Gives a restored guest another identity, and returns the outcome of each part. The caller
    /// sets the timeout, since the guest mounts volumes and writes files.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent does not answer.
    pub async fn assume_identity(&self, identity: &Identity) -> Result<IdentityReport, CallError> {
        let (mut reader, _writer) = self.request(FrameType::IDENTITY_REQ, identity).await?;
        let report = expect(&mut reader, FrameType::IDENTITY_RESP).await?;
        report.json().map_err(|_| CallError::Unexpected)
    }

    /// Suspends the guest: all processes but its agent stop until the host sends
    /// [`woken`](Self::woken) or [`assume_identity`](Self::assume_identity). With `sync`, the
    /// guest first flushes pending writes to its disks.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent does not answer, or if the guest's processes do not stop.
    pub async fn suspend(&self, sync: bool) -> Result<(), CallError> {
        self.act(FrameType::SUSPEND_REQ, &Suspend { sync }).await
    }

    /// Tells the guest that it was suspended. The call does no harm if it was not.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent does not answer.
    pub async fn woken(&self, woken: &Woken) -> Result<(), CallError> {
        self.act(FrameType::WOKEN_REQ, woken).await
    }

    /// Returns the recent activity in the guest.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent does not answer.
    pub async fn activity(&self) -> Result<ActivityInfo, CallError> {
        let (mut reader, _writer) = self.bare_request(FrameType::ACTIVITY_REQ).await?;
        expect(&mut reader, FrameType::ACTIVITY_RESP)
            .await?
            .json()
            .map_err(|_| CallError::Unexpected)
    }

    /// Returns the resources that the guest uses.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent does not answer, or is of a version that cannot tell.
    pub async fn load(&self) -> Result<LoadInfo, CallError> {
        let (mut reader, _writer) = self.bare_request(FrameType::LOAD_REQ).await?;
        expect(&mut reader, FrameType::LOAD_RESP).await?.json().map_err(|_| CallError::Unexpected)
    }

    /// Follows the events in the guest from now on.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable.
    pub async fn events(&self) -> Result<GuestEvents, CallError> {
        let (reader, writer) = self.bare_request(FrameType::EVENTS_REQ).await?;
        Ok(GuestEvents { reader, _writer: writer })
    }

    /// Asks the guest to shut down. Returns when the guest has agreed.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable or refuses.
    pub async fn shut_down(&self) -> Result<(), CallError> {
        let (mut reader, _writer) = self.bare_request(FrameType::SHUTDOWN_REQ).await?;
        expect(&mut reader, FrameType::EXIT).await.map(drop)
    }

    /// Waits until the guest can run a command.
    ///
    /// # Errors
    ///
    /// Returns the last error if no attempt succeeds within `limit`.
    pub async fn wait_ready(&self, limit: Duration) -> Result<(), CallError> {
        let mut last = CallError::Lost;
        let attempts = async {
            loop {
                let request =
                    ExecRequest { argv: vec!["true".to_owned()], ..ExecRequest::default() };
                match timeout(ATTEMPT_LIMIT, self.run(request)).await {
                    Ok(Ok((0, ..))) => return,
                    Ok(Ok(_)) | Err(_) => {}
                    Ok(Err(error)) => last = error,
                }
                sleep(ATTEMPT_PAUSE).await;
            }
        };
        if timeout(limit, attempts).await.is_ok() { Ok(()) } else { Err(last) }
    }
}
