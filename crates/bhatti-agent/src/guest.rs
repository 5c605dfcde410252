//! The guest as a whole.

use std::time::Duration;

use bhatti_proto::{
    ActivityInfo, ExecRequest, FrameType, GuestConfig, GuestEvent, GuestInit, Identity,
    IdentityReport, Suspend, Woken,
};
use tokio::time::{sleep, timeout};

use crate::{AgentClient, CallError, Reader, Writer, expect};

/// How long one attempt to reach an agent may take, and the pause between two.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// What happens in the guest. Dropping it ends the listening.
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
    /// Makes the guest what the configuration says: once, after its boot.
    ///
    /// # Errors
    ///
    /// Returns an error if a part cannot be done, or the guest has been configured.
    pub async fn configure(&self, config: &GuestConfig) -> Result<(), CallError> {
        self.act(FrameType::CONFIG_REQ, config).await
    }

    /// Starts the guest's init script, which its configuration has left out.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be asked. A script that does not start is named on the guest's console.
    pub async fn start_init(&self, script: &str) -> Result<(), CallError> {
        self.act(FrameType::INIT_REQ, &GuestInit { script: script.to_owned() }).await
    }

    /// Waits until the agent can be reached. What is said next arrives at once.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot.
    pub async fn reach(&self) -> Result<(), CallError> {
        // A stream that asks nothing: opening it takes the connection.
        let (_reader, mut writer) = self.open(bhatti_proto::CONTROL_PORT).await?;
        writer.flush().await.map_err(CallError::Write)
    }

    /// Gives a restored guest another identity, and returns what came of each part. How long that may take is the caller's to say: volumes are
    /// mounted and files written.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be asked.
    pub async fn assume_identity(&self, identity: &Identity) -> Result<IdentityReport, CallError> {
        let (mut reader, _writer) = self.request(FrameType::IDENTITY_REQ, identity).await?;
        let report = expect(&mut reader, FrameType::IDENTITY_RESP).await?;
        report.json().map_err(|_| CallError::Unexpected)
    }

    /// Has the guest stand still, but for its agent, until it is told that it has woken or who it is. With `sync`, what was written to its
    /// disks is on them first.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be asked, or its processes do not stand still.
    pub async fn suspend(&self, sync: bool) -> Result<(), CallError> {
        self.act(FrameType::SUSPEND_REQ, &Suspend { sync }).await
    }

    /// Tells the guest that it has stood still. Does no harm to one that has not.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be asked.
    pub async fn woken(&self, woken: &Woken) -> Result<(), CallError> {
        self.act(FrameType::WOKEN_REQ, woken).await
    }

    /// What happened in the guest lately.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be asked.
    pub async fn activity(&self) -> Result<ActivityInfo, CallError> {
        let (mut reader, _writer) = self.bare_request(FrameType::ACTIVITY_REQ).await?;
        expect(&mut reader, FrameType::ACTIVITY_RESP)
            .await?
            .json()
            .map_err(|_| CallError::Unexpected)
    }

    /// Listens to what happens in the guest from now on.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be reached.
    pub async fn events(&self) -> Result<GuestEvents, CallError> {
        let (reader, writer) = self.bare_request(FrameType::EVENTS_REQ).await?;
        Ok(GuestEvents { reader, _writer: writer })
    }

    /// Asks the guest to shut down. Returns when it has said that it will.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent cannot be reached or refuses.
    pub async fn shut_down(&self) -> Result<(), CallError> {
        let (mut reader, _writer) = self.bare_request(FrameType::SHUTDOWN_REQ).await?;
        expect(&mut reader, FrameType::EXIT).await.map(drop)
    }

    /// Waits until a command can be run.
    ///
    /// # Errors
    ///
    /// Returns the last error if none can within `limit`.
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
