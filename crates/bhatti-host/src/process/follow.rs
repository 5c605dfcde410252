//! Processes that are followed by descriptor, children or not.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Names one process for as long as the machine is up: its number may be used again, the pair may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since the machine did: field 22 of proc_pid_stat(5).
    pub started_ticks: u64,
}

/// A process that can be waited for and killed without mistaking another for it.
#[derive(Debug)]
pub struct Followed {
    id: ProcessId,
    descriptor: AsyncFd<OwnedFd>,
}

impl Followed {
    /// Follows a child of this process. Must be called inside a Tokio runtime.
    pub(super) fn child(pid: u32) -> io::Result<Self> {
        // Nobody else reaps our children, so the number is still the child's.
        let id = ProcessId { pid, started_ticks: stat(pid)?.started_ticks };
        Self::open(id)
    }

    /// Follows the process that `id` names. Must be called inside a Tokio runtime.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::NotFound`] if it has ended, even if another process has its number now. Any other error says nothing
    /// about the process.
    pub fn adopt(id: ProcessId) -> io::Result<Self> {
        let followed = Self::open(id)?;
        // Looked at only now: the descriptor keeps the number from being used again.
        let Stat { state, started_ticks } = stat(id.pid)?;
        // One that has ended and that nobody has collected yet is as gone as any.
        if started_ticks == id.started_ticks && !matches!(state, 'Z' | 'X') {
            Ok(followed)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Finds the process of `program` (the last part of its path) whose command line holds `argument` as one whole argument.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::NotFound`] if there is none.
    pub fn find_by_argument(program: &str, argument: &str) -> io::Result<Self> {
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let command_line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let mut arguments = command_line.split(|byte| *byte == 0);
            let is_program = arguments.next().is_some_and(|path| {
                path.rsplit(|byte| *byte == b'/').next() == Some(program.as_bytes())
            });
            if is_program && arguments.any(|found| found == argument.as_bytes()) {
                let id = ProcessId { pid, started_ticks: stat(pid)?.started_ticks };
                return Self::adopt(id);
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    fn open(id: ProcessId) -> io::Result<Self> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let pid = i32::try_from(id.pid)
            .ok()
            .filter(|pid| *pid > 1)
            .and_then(Pid::from_raw)
            .ok_or_else(gone)?;
        let descriptor = pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(|error| match error {
            Errno::SRCH => gone(),
            error => error.into(),
        })?;
        // SAFETY: an `OwnedFd` names the same open file for as long as it lives.
        #[expect(unsafe_code, reason = "the runtime asks for a promise about the descriptor")]
        let descriptor =
            unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok(Self { id, descriptor })
    }

    /// Which process it is.
    #[must_use]
    pub const fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits until it has ended, and reaps it if it was a child.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn ended(&self) {
        // The descriptor is readable from the end on. A runtime that shuts down ends the wait, too.
        drop(self.descriptor.readable().await);
        self.reap();
    }

    fn reap(&self) {
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        // Not being our child is no failure.
        let _: rustix::io::Result<_> =
            waitid(WaitId::PidFd(self.descriptor.get_ref().as_fd()), ended);
    }

    /// Kills it. Killing a process that has ended is no error.
    pub fn kill(&self) {
        let _: rustix::io::Result<()> = pidfd_send_signal(self.descriptor.get_ref(), Signal::KILL);
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.reap();
    }
}

/// What `/proc/PID/stat` says: proc_pid_stat(5).
struct Stat {
    state: char,
    started_ticks: u64,
}

fn stat(pid: u32) -> io::Result<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, the command in parentheses, may hold anything; the state follows, and the nineteenth after it is the start.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let state = fields.next().and_then(|state| state.chars().next());
    let started_ticks = fields.nth(18).and_then(|ticks| ticks.parse().ok());
    state.zip(started_ticks).map(|(state, started_ticks)| Stat { state, started_ticks }).ok_or_else(
        || io::Error::new(io::ErrorKind::InvalidData, "no state or start time in /proc/PID/stat"),
    )
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs::File;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::process::spawn_detached;

    fn sleeper(argument: &str) -> Followed {
        let output = File::open("/dev/null").unwrap();
        spawn_detached(
            OsStr::new("sh"),
            &["-c".into(), "sleep 60".into(), argument.into()],
            &[],
            &[],
            &output,
        )
        .unwrap()
    }

    #[tokio::test]
    async fn process_is_followed_to_its_end_and_leaves_no_zombie() {
        let process = sleeper("zombie-check");
        process.kill();

        timeout(Duration::from_secs(5), process.ended()).await.unwrap();

        assert!(!std::path::Path::new(&format!("/proc/{}", process.id().pid)).exists());
    }

    #[tokio::test]
    async fn process_with_the_same_number_is_not_adopted() {
        let process = sleeper("number-check");
        let ProcessId { pid, started_ticks } = process.id();

        let other = Followed::adopt(ProcessId { pid, started_ticks: started_ticks + 1 });

        assert_eq!(other.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(Followed::adopt(process.id()).is_ok());
        process.kill();
        process.ended().await;
    }

    #[tokio::test]
    async fn process_that_has_ended_and_was_not_collected_is_gone() {
        let process = sleeper("zombie-adoption");
        process.kill();
        let ended = async {
            while stat(process.id().pid).unwrap().state != 'Z' {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(5), ended).await.unwrap();

        let zombie = Followed::adopt(process.id());

        assert_eq!(zombie.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn process_is_found_by_an_argument_of_its_own() {
        let argument = format!("find-me-{}", std::process::id());
        let process = sleeper(&argument);

        let found = Followed::find_by_argument("sh", &argument).unwrap();

        assert_eq!(found.id(), process.id());
        assert!(Followed::find_by_argument("bash", &argument).is_err());
        process.kill();
        process.ended().await;
        assert_eq!(
            Followed::find_by_argument("sh", &argument).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
