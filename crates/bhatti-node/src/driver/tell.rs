//! Telling a guest that it was paused: it gets random bytes and the time, and thaws its processes.

use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::CallError;
use bhatti_types::{Report, Thermal};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::access::Running;
use super::sandbox::Sandbox;
use crate::identity;

/// The time limit of one message.
const TELL_LIMIT: Duration = Duration::from_secs(10);
/// The error of a guest's clock that is accepted.
const TELL_EXACT: Duration = Duration::from_millis(10);

/// How many times a guest that did not answer is told again, and the pause in between.
const TELL_AGAIN: u32 = 30;
const TELL_PAUSE: Duration = Duration::from_secs(2);

impl Sandbox {
    /// Tells the guest that it was paused. A guest that does not answer is told again in the
    /// background: its processes are frozen until it has got the message.
    pub(crate) async fn tell_woken(&self, running: &Running) {
        let began = Instant::now();
        let mut is_done = self.try_tell_woken(running).await;
        if is_done && began.elapsed() > TELL_EXACT {
            // The message was slow, so the guest's clock is late. The second message is fast.
            is_done = self.try_tell_woken(running).await;
        }
        if !is_done {
            let (id, agent) = (self.id, running.agent.clone());
            let access = Arc::clone(&self.access);
            tokio::spawn(async move {
                for _ in 0..TELL_AGAIN {
                    sleep(TELL_PAUSE).await;
                    if access.thermal() != Some(Thermal::Hot) {
                        // It was paused since, and is told when it is resumed.
                        return;
                    }
                    let Ok(woken) = identity::woken() else { return };
                    if matches!(timeout(TELL_LIMIT, agent.woken(&woken)).await, Ok(Ok(()))) {
                        info!(sandbox = %id, "Told the guest at last that it was woken");
                        return;
                    }
                }
            });
        }
    }

    async fn try_tell_woken(&self, running: &Running) -> bool {
        let is_done = timeout(TELL_LIMIT, async {
            running.agent.reach().await?;
            // Made only now: the time in it must be the time of its arrival.
            let woken = identity::woken().map_err(|_| CallError::Entropy)?;
            running.agent.woken(&woken).await
        });
        let is_done = is_done.await.unwrap_or(Err(CallError::Silent { limit: TELL_LIMIT }));
        if let Err(error) = &is_done {
            warn!(sandbox = %self.id, error = %Report(error), "Failed to tell the guest that it was woken");
        }
        is_done.is_ok()
    }
}
