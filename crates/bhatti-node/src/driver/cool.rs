//! Cooling: an unused sandbox is paused, and later saved.

use bhatti_types::Report;
use serde_json::json;
use tokio::time::{Duration, Instant, timeout};
use tracing::warn;

use super::access::Running;
use super::sandbox::Sandbox;
use super::state::Kind;

/// How long a guest may take to report its activity.
const ACTIVITY_LIMIT: Duration = Duration::from_secs(1);

/// How many times in a row a guest may leave the question for its activity unanswered until it is
/// paused. A guest that is slow to answer may be busy with a job.
const SILENCES_MAX: u32 = 5;

/// What a guest reports about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// A job runs, or a client is attached to a session.
    Busy,
    /// Neither.
    Idle,
    /// The guest did not answer in time.
    Silent,
}

/// Unanswered questions in a row.
#[derive(Debug, Default)]
pub(super) struct Silences(u32);

impl Silences {
    /// Returns whether the guest may be paused.
    fn may_pause(&mut self, activity: Activity) -> bool {
        match activity {
            Activity::Busy => self.0 = 0,
            Activity::Idle => {
                self.0 = 0;
                return true;
            }
            Activity::Silent => self.0 += 1,
        }
        let is_given_up = self.0 >= SILENCES_MAX;
        if is_given_up {
            self.0 = 0;
        }
        is_given_up
    }
}

impl Sandbox {
    /// Cools the sandbox by one step, at its deadline.
    pub(super) async fn cool(&self, silences: &mut Silences) {
        let Some(running) = self.access.running() else { return };
        let (kind, cooled) = match self.access.kind() {
            Kind::Hot => {
                let asked_at = Instant::now();
                let may_pause = silences.may_pause(activity(&running).await);
                // A use that came and went since the question may have started a job.
                if !may_pause || !self.access.close_if_unused(asked_at) {
                    self.access.touch();
                    return;
                }
                ("thermal.paused", self.pause(&running, false).await.map(drop))
            }
            _ => ("thermal.saved", self.sleep(false).await),
        };
        if let Err(error) = cooled {
            self.record("thermal.failed", json!({ "error": error.to_string() }));
            warn!(sandbox = %self.id, error = %Report(&error), "Failed to cool a sandbox");
            self.access.touch();
        } else {
            self.record(kind, json!({ "asked": false }));
        }
    }
}

/// Asks a guest that runs for its activity: a paused guest cannot answer.
async fn activity(running: &Running) -> Activity {
    match timeout(ACTIVITY_LIMIT, running.agent.activity()).await {
        Ok(Ok(activity)) if activity.running_jobs > 0 || activity.attached_sessions > 0 => {
            Activity::Busy
        }
        Ok(Ok(_)) => Activity::Idle,
        Ok(Err(_)) | Err(_) => Activity::Silent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_guest_is_paused_only_after_several_questions() {
        let mut silences = Silences::default();
        let asked =
            |silences: &mut Silences| (1..).find(|_| silences.may_pause(Activity::Silent)).unwrap();
        assert_eq!(asked(&mut silences), SILENCES_MAX);
        assert_eq!(asked(&mut silences), SILENCES_MAX, "they are counted anew");

        assert!(!silences.may_pause(Activity::Silent));
        assert!(!silences.may_pause(Activity::Busy), "an answer ends the silence");
        assert_eq!(asked(&mut silences), SILENCES_MAX);
        assert!(silences.may_pause(Activity::Idle));
    }
}
