//! The time around a snapshot, in which only the agent runs: what a user's process sees must be either the guest that was saved or the one
//! that it became, never one in between.

use std::fs;
use std::io;
use std::time::Duration;

use bhatti_proto::{ErrorKind, Suspend, Woken};
use tokio::time::{sleep, timeout};

use crate::agent::Agent;
use crate::launch::USER_CGROUP;
use crate::log;
use crate::refusal::{OpError, refused};
use crate::settings::{feed_random, set_clock};

/// How long the users' processes may take to stand still, and how often to look.
const FREEZE_LIMIT: Duration = Duration::from_millis(500);
const FREEZE_LOOK: Duration = Duration::from_millis(1);

/// How long the disks may take.
const SYNC_LIMIT: Duration = Duration::from_secs(20);

/// Serves one `SUSPEND_REQ`. If it is refused, everything runs as before.
pub(crate) async fn suspend(agent: &Agent, request: &Suspend) -> Result<(), OpError> {
    if !agent.is_guest {
        return Ok(());
    }
    let suspended = async {
        let wakes = agent.wakes();
        if request.sync {
            sync().await?;
        }
        if agent.wakes() != wakes {
            return Err(io::Error::other("the guest was woken meanwhile"));
        }
        agent.set_suspended(true);
        freeze().await
    };
    suspended.await.map_err(|error| {
        thaw(agent);
        refused(ErrorKind::Other, format!("suspend: {error}")).into()
    })
}

/// Serves one `WOKEN_REQ`: does all of it, whatever fails.
pub(crate) fn wake(agent: &Agent, woken: &Woken) {
    if !agent.is_guest {
        return;
    }
    for (step, done) in [
        // First: it is later with everything else that is done before.
        ("set the clock", set_clock(woken.wall_clock_ns)),
        ("feed the random number generator", feed_random(&woken.entropy)),
    ] {
        if let Err(error) = done {
            log::line(format_args!("failed to {step}: {error}"));
        }
    }
    thaw(agent);
}

/// Lets the users' processes run.
pub(crate) fn thaw(agent: &Agent) {
    if !agent.is_guest {
        return;
    }
    if let Err(error) = set_frozen(false) {
        log::line(format_args!("failed to let the processes run: {error}"));
    }
    agent.set_suspended(false);
}

async fn freeze() -> io::Result<()> {
    set_frozen(true)?;
    let standing_still = async {
        while !is_frozen()? {
            sleep(FREEZE_LOOK).await;
        }
        Ok(())
    };
    let late = || io::Error::new(io::ErrorKind::TimedOut, "some processes do not stand still");
    timeout(FREEZE_LIMIT, standing_still).await.map_err(|_| late())?
}

fn set_frozen(frozen: bool) -> io::Result<()> {
    fs::write(format!("{USER_CGROUP}/cgroup.freeze"), if frozen { "1" } else { "0" })
}

fn is_frozen() -> io::Result<bool> {
    let events = fs::read_to_string(format!("{USER_CGROUP}/cgroup.events"))?;
    Ok(events.lines().any(|line| line == "frozen 1"))
}

async fn sync() -> io::Result<()> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the disks take too long");
    let synced = tokio::task::spawn_blocking(rustix::fs::sync);
    timeout(SYNC_LIMIT, synced).await.map_err(late)?.map_err(io::Error::other)
}
