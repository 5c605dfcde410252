//! The time limit of a sandbox: its driver destroys or stops it at the end.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bhatti_types::{Denied, Report, SandboxState, TimeLimit, TimeLimitChange};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::{Duration, sleep, sleep_until};
use tracing::error;

use super::destroy::Retry;
use super::error::TransitionError;
use super::sandbox::Sandbox;

/// The interval between two looks at the wall clock, which may be set.
const CLOCK_LOOK: Duration = Duration::from_secs(60);

/// The time limit that a sandbox has now. It survives a driver that panics.
pub(super) struct Timer(Mutex<State>);

struct State {
    limit: TimeLimit,
    /// When the sandbox is to be stopped again, after attempts that failed.
    retry: Retry,
}

impl Timer {
    pub(super) fn new(limit: TimeLimit) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { limit, retry: Retry::default() })))
    }
}

impl Sandbox {
    /// Returns the time limit.
    pub(super) fn time_limit(&self) -> TimeLimit {
        self.timer.0.lock().limit
    }

    /// Changes the time limit.
    pub(super) fn change_time_limit(&self, change: TimeLimitChange) -> Result<(), TransitionError> {
        if change.only_running && self.access.state() != SandboxState::Running {
            return Err(Denied::Stopped.into());
        }
        self.set_time_limit(self.time_limit().with(change))
    }

    fn set_time_limit(&self, limit: TimeLimit) -> Result<(), TransitionError> {
        self.shared.store.set_sandbox_time_limit(self.id, limit)?;
        *self.timer.0.lock() = State { limit, retry: Retry::default() };
        Ok(())
    }

    /// Waits until the time is over, and another attempt is due if one has failed. For ever without
    /// a limit. Cancel safe.
    pub(super) async fn time_is_over(&self) {
        let (expires_at, attempt_at) = {
            let timer = self.timer.0.lock();
            (timer.limit.expires_at, timer.retry.at())
        };
        until(expires_at).await;
        sleep_until(attempt_at).await;
    }

    /// Removes the limit of a sandbox that was stopped at its end, or that has failed and has
    /// nothing to stop. If it runs on, or the store fails, another attempt follows.
    pub(super) fn end_time_limit(&self) {
        let limit = TimeLimit { expires_at: None, ..self.time_limit() };
        if self.access.state() != SandboxState::Running {
            match self.set_time_limit(limit) {
                Ok(()) => return self.record("sandbox.expired", json!({})),
                Err(error) => error!(
                    sandbox = %self.id,
                    error = %Report(&error),
                    "Failed to remove a time limit that is over; the daemon tries again"
                ),
            }
        }
        self.timer.0.lock().retry.note_failure();
    }
}

/// Waits until a time in seconds since 1970, or forever if there is none.
async fn until(unix_seconds: Option<u64>) {
    let Some(at) = unix_seconds else { return std::future::pending().await };
    let at = UNIX_EPOCH + Duration::from_secs(at);
    while let Ok(left) = at.duration_since(SystemTime::now()) {
        sleep(left.min(CLOCK_LOOK)).await;
    }
}
