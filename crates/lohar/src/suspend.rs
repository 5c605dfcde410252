//! Suspends the guest around a snapshot, so that only the agent runs. A user's process must see
//! either the guest that was saved or the guest after the restore, never a state in between.

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

use crate::Agent;
use crate::clock::{feed_random, set_clock};
use crate::log;
use crate::processes::USER_CGROUP;
use crate::refusal::{OpError, refused};

/// How long freezing the users' processes may take, and how often the agent checks.
const FREEZE_LIMIT: Duration = Duration::from_millis(500);
const FREEZE_LOOK: Duration = Duration::from_millis(1);

/// `FIFREEZE` and `FITHAW` of linux/fs.h.
const FREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const THAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;

/// How long syncing the disks may take, and freezing the volumes after that. Together these
/// limits are shorter than the time that the host waits.
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
            // Last: a process that waits for a frozen file system cannot be frozen.
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

/// Serves one `WOKEN_REQ`: performs every step, even if one fails.
pub(crate) fn wake(agent: &Agent, woken: &Woken) {
    if !agent.place.has_kernel() {
        return;
    }
    for (step, done) in [
        // First: every step before this one would make the clock lag.
        ("set the clock", set_clock(woken.wall_clock_ns)),
        ("feed the random number generator", feed_random(&woken.entropy)),
    ] {
        if let Err(error) = done {
            log::line(format_args!("failed to {step}: {error}"));
        }
    }
    thaw(agent);
}

/// Thaws the volumes and the users' processes.
pub(crate) fn thaw(agent: &Agent) {
    if !agent.place.has_kernel() {
        return;
    }
    thaw_volumes(agent);
    if let Err(error) = set_frozen(false) {
        log::line(format_args!("failed to thaw the users' processes: {error}"));
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
    let late = || io::Error::new(io::ErrorKind::TimedOut, "some processes did not freeze in time");
    timeout(FREEZE_LIMIT, standing_still).await.map_err(|_| late())?
}

fn set_frozen(frozen: bool) -> io::Result<()> {
    // A kernel file, so there is nothing to truncate.
    let mut switch = File::options().write(true).open(format!("{USER_CGROUP}/cgroup.freeze"))?;
    switch.write_all(if frozen { b"1" } else { b"0" })
}

fn is_frozen() -> io::Result<bool> {
    let events = fs::read_to_string(format!("{USER_CGROUP}/cgroup.events"))?;
    Ok(events.lines().any(|line| line == "frozen 1"))
}

/// Freezes the volumes: until they are thawed, each holds everything that was written to it, with
/// no journal to replay.
async fn freeze_volumes(agent: &Agent) -> io::Result<()> {
    let volumes = agent.settings.borrow().volumes.clone();
    let given_up = Arc::new(AtomicBool::new(false));
    let is_given_up = Arc::clone(&given_up);
    let frozen = tokio::task::spawn_blocking(move || {
        let freeze = |mount: &String| match change_volume(mount, FREEZE) {
            _ if is_given_up.load(Ordering::SeqCst) => Err(Errno::CANCELED),
            // The file system is frozen already, or has no disk to freeze.
            Err(Errno::BUSY | Errno::OPNOTSUPP) => Ok(()),
            frozen => frozen,
        };
        let frozen = volumes.iter().rev().try_for_each(freeze);
        if is_given_up.load(Ordering::SeqCst) {
            // The agent thawed the volumes before the last one was frozen.
            for mount in &volumes {
                // A volume that is not frozen refuses.
                let _refused = change_volume(mount, THAW);
            }
        }
        frozen
    });
    let late = |_| {
        given_up.store(true, Ordering::SeqCst);
        io::Error::new(io::ErrorKind::TimedOut, "freezing the volumes took too long")
    };
    let frozen = timeout(FREEZE_VOLUMES_LIMIT, frozen).await.map_err(late)?;
    Ok(frozen.map_err(io::Error::other)??)
}

fn thaw_volumes(agent: &Agent) {
    for mount in &agent.settings.borrow().volumes {
        match change_volume(mount, THAW) {
            // The volume is not frozen.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => log::line(format_args!("failed to thaw {mount}: {error}")),
        }
    }
}

/// Freezes or thaws the file system that is mounted at `mount`. If nothing is mounted there any
/// more, the path is on the root file system, which stays unchanged.
fn change_volume(mount: &str, request: libc::Ioctl) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match open(mount, flags, Mode::empty()) {
        // Without the directory, nothing is mounted there.
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
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "syncing the disks took too long");
    let synced = tokio::task::spawn_blocking(rustix::fs::sync);
    timeout(SYNC_LIMIT, synced).await.map_err(late)?.map_err(io::Error::other)
}
