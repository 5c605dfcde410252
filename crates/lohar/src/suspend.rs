//! The time around a snapshot, in which only the agent runs: what a user's process sees must be either the guest that was saved or the one
//! that it became, never one in between.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bhatti_proto::{ErrorKind, Suspend, Woken};
use rustix::fs::{Mode, OFlags, fstat, open, stat};
use rustix::io::Errno;
use tokio::time::{sleep, timeout};

use crate::agent::Agent;
use crate::log;
use crate::processes::USER_CGROUP;
use crate::refusal::{OpError, refused};
use crate::settings::{feed_random, set_clock};

/// How long the users' processes may take to stand still, and how often to look.
const FREEZE_LIMIT: Duration = Duration::from_millis(500);
const FREEZE_LOOK: Duration = Duration::from_millis(1);

/// `FIFREEZE` and `FITHAW` of linux/fs.h.
const FREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const THAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;

/// How long the disks may take, and the volumes after that: together less than the host waits.
const SYNC_LIMIT: Duration = Duration::from_secs(15);
const FREEZE_VOLUMES_LIMIT: Duration = Duration::from_secs(5);

/// Serves one `SUSPEND_REQ`. If it is refused, everything runs as before.
pub(crate) async fn suspend(agent: &Agent, request: &Suspend) -> Result<(), OpError> {
    if !agent.place.has_kernel() {
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
        freeze().await?;
        if request.sync {
            // Last: who waits for a disk that stands still cannot be made to stand still.
            freeze_volumes(agent).await?;
        }
        if agent.wakes() != wakes {
            return Err(io::Error::other("the guest was woken meanwhile"));
        }
        Ok(())
    };
    suspended.await.map_err(|error| {
        thaw(agent);
        refused(ErrorKind::Other, format!("suspend: {error}")).into()
    })
}

/// Serves one `WOKEN_REQ`: does all of it, whatever fails.
pub(crate) fn wake(agent: &Agent, woken: &Woken) {
    if !agent.place.has_kernel() {
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
    if !agent.place.has_kernel() {
        return;
    }
    thaw_volumes(agent);
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
    // A file of the kernel's, so there is nothing to truncate.
    let mut switch = File::options().write(true).open(format!("{USER_CGROUP}/cgroup.freeze"))?;
    switch.write_all(if frozen { b"1" } else { b"0" })
}

fn is_frozen() -> io::Result<bool> {
    let events = fs::read_to_string(format!("{USER_CGROUP}/cgroup.events"))?;
    Ok(events.lines().any(|line| line == "frozen 1"))
}

/// Has the volumes hold all that was written to them, with nothing left to be replayed, until they are thawed.
async fn freeze_volumes(agent: &Agent) -> io::Result<()> {
    let volumes = agent.settings.borrow().volumes.clone();
    let given_up = Arc::new(AtomicBool::new(false));
    let is_given_up = Arc::clone(&given_up);
    let frozen = tokio::task::spawn_blocking(move || {
        let freeze = |mount: &String| match change_volume(mount, FREEZE) {
            _ if is_given_up.load(Ordering::SeqCst) => Err(Errno::CANCELED),
            // It is frozen already, or keeps nothing.
            Err(Errno::BUSY | Errno::OPNOTSUPP) => Ok(()),
            frozen => frozen,
        };
        let frozen = volumes.iter().rev().try_for_each(freeze);
        if is_given_up.load(Ordering::SeqCst) {
            // Whoever thawed them did not see the last one.
            for mount in &volumes {
                // One that is not frozen refuses.
                let _refused = change_volume(mount, THAW);
            }
        }
        frozen
    });
    let late = |_| {
        given_up.store(true, Ordering::SeqCst);
        io::Error::new(io::ErrorKind::TimedOut, "the volumes take too long")
    };
    let frozen = timeout(FREEZE_VOLUMES_LIMIT, frozen).await.map_err(late)?;
    Ok(frozen.map_err(io::Error::other)??)
}

fn thaw_volumes(agent: &Agent) {
    for mount in &agent.settings.borrow().volumes {
        match change_volume(mount, THAW) {
            // It is not frozen.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => log::line(format_args!("failed to thaw {mount}: {error}")),
        }
    }
}

/// Freezes or thaws the file system that is mounted at `mount`. If there is none any more, it is the root's, which stays as it is.
fn change_volume(mount: &str, request: libc::Ioctl) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match open(mount, flags, Mode::empty()) {
        // Nothing is mounted any more where there is nothing.
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        directory => directory?,
    };
    if fstat(&directory)?.st_dev == stat("/")?.st_dev {
        return Ok(());
    }
    // SAFETY: the descriptor is open, and the request reads no memory of ours.
    #[expect(unsafe_code, reason = "no safe wrapper of this ioctl exists")]
    let result = unsafe { libc::ioctl(directory.as_raw_fd(), request, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

async fn sync() -> io::Result<()> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the disks take too long");
    let synced = tokio::task::spawn_blocking(rustix::fs::sync);
    timeout(SYNC_LIMIT, synced).await.map_err(late)?.map_err(io::Error::other)
}
