//! Stopping: the sandbox is saved, its VM ends, and it stays stopped until it is started.

use bhatti_types::SandboxState;
use serde_json::json;

use super::access::Running;
use super::error::TransitionError;
use super::sandbox::Sandbox;
use super::state::State;
use super::steps::Step;

impl Sandbox {
    /// Stops the sandbox. An engine that cannot save memory ends the processes.
    pub(crate) async fn stop(&self) -> Result<(), TransitionError> {
        let running = self.access.running();
        self.write(SandboxState::Stopped)?;
        self.reached(Step::StopNoted).await;
        let Some(running) = running else {
            self.access.set(State::Stopped);
            self.record("sandbox.stopped", json!({}));
            return Ok(());
        };
        self.access.set(State::Stopping(running.clone()));
        let stopped = if self.saves_memory() {
            self.save_and_end(&running, true).await
        } else {
            self.end(&running).await
        };
        match &stopped {
            Ok(()) => {
                self.access.set(State::Stopped);
                self.record("sandbox.stopped", json!({}));
            }
            Err(error) => {
                self.access.set(self.state_with(&running).await);
                // Even if the store fails: a daemon that finds a stopped sandbox with a VM finishes
                // the stop.
                self.write(SandboxState::Running)?;
                self.record("sandbox.stop_failed", json!({ "error": error.to_string() }));
            }
        }
        stopped
    }

    /// Ends the VM and loses its memory.
    async fn end(&self, running: &Running) -> Result<(), TransitionError> {
        self.write_volumes(running).await;
        let killed = self.shared.engine.kill(self.id, &self.directory()).await;
        killed.map_err(TransitionError::End)?;
        self.reached(Step::Ended).await;
        Ok(())
    }
}
