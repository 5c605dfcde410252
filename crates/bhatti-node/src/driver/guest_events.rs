//! Records the events that guests report about themselves.
//!
//! A guest can send as many events as it likes. The daemon records [`BURST`] of them at once and
//! then one in each [`RATE`]. It counts the others and reads them slowly, so that a guest that
//! floods it waits.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bhatti_agent::AgentClient;
use bhatti_engine::Vm;
use bhatti_proto::GuestEvent;
use bhatti_types::{SandboxId, UserId};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::access::Running;
use crate::ControlPlane;

/// Number of events of a guest that are recorded at once, and the time until one more is allowed.
const BURST: u32 = 10;
const RATE: Duration = Duration::from_secs(60);

/// The pause after an event that is only counted.
const PAUSE: Duration = Duration::from_millis(100);

/// Maximum recorded length of a name or a cgroup, in characters.
const TEXT_CHARS_MAX: usize = 128;

/// The task that records the events of a sandbox's guest. It ends when this is dropped.
#[derive(Default)]
pub(crate) struct Listener(Mutex<Listening>);

#[derive(Default)]
struct Listening {
    /// The VM whose events are recorded.
    vm: Option<Weak<dyn Vm>>,
    task: JoinSet<()>,
}

/// The sandbox whose events are recorded.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) sandbox: SandboxId,
    pub(crate) owner: UserId,
    pub(crate) control: Arc<dyn ControlPlane>,
}

impl Listener {
    /// Records the events of the guest of `running` from now on, unless a task does so already.
    pub(crate) fn listen(&self, source: Source, running: &Running) {
        let mut listening = self.0.lock();
        let vm = Arc::downgrade(&running.vm);
        let is_same = listening.vm.as_ref().is_some_and(|listened| listened.ptr_eq(&vm));
        while listening.task.try_join_next().is_some() {}
        if is_same && !listening.task.is_empty() {
            return;
        }
        listening.task.abort_all();
        listening.vm = Some(vm);
        // The task does not hold the VM, so that the memory is freed when the driver drops the VM.
        let agent = running.agent.clone();
        listening.task.spawn(async move { record(source, &agent).await });
    }
}

/// Records a guest's events until its connection ends.
async fn record(source: Source, agent: &AgentClient) {
    let Ok(mut events) = agent.events().await else { return };
    let mut pace = Pace::new();
    while let Ok(event) = events.next().await {
        let Some(missed) = pace.admit().await else { continue };
        let (kind, mut detail) = describe(event);
        if missed > 0 {
            detail["missed"] = json!(missed);
        }
        source.control.record(kind, source.owner, source.sandbox, detail);
    }
}

/// The rate limit on the events of one guest.
struct Pace {
    allowance: Allowance,
    missed: u64,
}

impl Pace {
    fn new() -> Self {
        Self { allowance: Allowance::new(), missed: 0 }
    }

    /// Admits an event to be recorded, and returns how many before it were only counted. An event
    /// beyond the rate is counted, after a pause that slows the guest down.
    async fn admit(&mut self) -> Option<u64> {
        if self.allowance.take() {
            return Some(std::mem::take(&mut self.missed));
        }
        self.missed += 1;
        sleep(PAUSE).await;
        None
    }
}

fn describe(event: GuestEvent) -> (&'static str, Value) {
    let short = |text: String| text.chars().take(TEXT_CHARS_MAX).collect::<String>();
    match event {
        GuestEvent::OomKill { pid, name, cgroup } => {
            let detail = json!({ "pid": pid, "name": short(name), "cgroup": cgroup.map(short) });
            ("sandbox.oom_kill", detail)
        }
    }
}

/// The number of events that may still be recorded.
struct Allowance {
    left: u32,
    since: Instant,
}

impl Allowance {
    fn new() -> Self {
        Self { left: BURST, since: Instant::now() }
    }

    /// Takes one event from the allowance, if any is left.
    fn take(&mut self) -> bool {
        while self.left < BURST && self.since.elapsed() >= RATE {
            self.left += 1;
            self.since += RATE;
        }
        if self.left == BURST {
            self.since = Instant::now();
        }
        let taken = self.left.checked_sub(1);
        self.left = taken.unwrap_or_default();
        taken.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn guest_is_recorded_at_a_rate_and_counted_beyond() {
        let mut allowance = Allowance::new();
        let take = |allowance: &mut Allowance| (0..1000).filter(|_| allowance.take()).count();

        assert_eq!(take(&mut allowance), BURST as usize);
        tokio::time::advance(RATE * 3).await;
        assert_eq!(take(&mut allowance), 3);
        tokio::time::advance(RATE * 1000).await;
        assert_eq!(take(&mut allowance), BURST as usize);
    }

    #[tokio::test(start_paused = true)]
    async fn guest_that_sends_too_many_events_is_read_slowly() {
        let (mut pace, began) = (Pace::new(), Instant::now());
        let mut recorded = Vec::new();

        for _ in 0..1000 {
            recorded.extend(pace.admit().await);
        }

        // One more for the minute that the pauses after the others took.
        let expected = [vec![0; BURST as usize], vec![600]].concat();
        assert_eq!(recorded, expected);
        assert_eq!(began.elapsed(), PAUSE * (1000 - BURST - 1));
    }

    #[test]
    fn text_of_a_guest_is_cut_short() {
        let (name, cgroup) = ("x".repeat(1 << 20), Some("y".repeat(1 << 20)));

        let (kind, detail) = describe(GuestEvent::OomKill { pid: 7, name, cgroup });

        assert_eq!((kind, &detail["pid"]), ("sandbox.oom_kill", &json!(7)));
        assert!(detail.to_string().len() < 3 * TEXT_CHARS_MAX);
    }
}
