//! Follows processes by descriptor, children or not.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Identifies one process for as long as the machine is up. The kernel may reuse the number, but
/// never the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// Process number.
    pub pid: u32,
    /// Start time, in clock ticks since the machine booted: field 22 of proc_pid_stat(5).
    pub started_ticks: u64,
}

/// Resources that a process has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// CPU time since it started.
    pub cpu: Duration,
    /// Memory, in bytes. A shared page counts in proportion (`Pss` of proc_pid_smaps(5)).
    pub memory_bytes: u64,
}

/// A process that can be awaited and killed without mistaking another one for it.
#[derive(Debug)]
pub struct Followed {
    id: ProcessId,
    descriptor: AsyncFd<OwnedFd>,
}

impl Followed {
    /// Follows a child of this process. Must be called inside a Tokio runtime.
    pub(super) fn child(pid: u32) -> io::Result<Self> {
        // No other code reaps this child, so the number is still the child's.
        let id = ProcessId { pid, started_ticks: stat(pid)?.started_ticks };
        Self::open(id)
    }

    /// Follows the process that `id` names. Must be called inside a Tokio runtime.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::NotFound`] if the process has ended, even if another process has
    /// its number now. Any other error says nothing about the process.
    pub fn adopt(id: ProcessId) -> io::Result<Self> {
        let followed = Self::open(id)?;
        // Read after the descriptor was opened, because the descriptor keeps the number from
        // being reused.
        let Stat { state, started_ticks, .. } = stat(id.pid)?;
        // A zombie, a process that has ended and was not reaped yet, counts as gone.
        if started_ticks == id.started_ticks && !matches!(state, 'Z' | 'X') {
            Ok(followed)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Finds the process of `program` (the last part of its path) whose command line has
    /// `argument` as one whole argument.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::NotFound`] if there is no such process.
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

    /// Follows the process that has the number `pid` now. Must be called inside a Tokio runtime.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::NotFound`] if there is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let started_ticks = stat(pid).map_err(|_| io::ErrorKind::NotFound)?.started_ticks;
        Self::adopt(ProcessId { pid, started_ticks })
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
        let descriptor = crate::socket::watch(descriptor, Interest::READABLE)?;
        Ok(Self { id, descriptor })
    }

    /// Returns the process's identity.
    #[must_use]
    pub const fn id(&self) -> ProcessId {
        self.id
    }

    /// Returns the resources that the process has used so far.
    ///
    /// # Errors
    ///
    /// Returns an error if the process has ended.
    pub fn usage(&self) -> io::Result<Usage> {
        let pid = self.id.pid;
        let ticks_per_second = rustix::param::clock_ticks_per_second();
        let cpu = Duration::from_millis(stat(pid)?.cpu_ticks * 1000 / ticks_per_second.max(1));
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let kib = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib: u64 = kib
            .and_then(|kib| kib.trim().trim_end_matches(" kB").parse().ok())
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok(Usage { cpu, memory_bytes: kib << 10 })
    }

    /// Waits until the process has ended, and reaps it if it was a child.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn ended(&self) {
        // The descriptor is readable once the process has ended. A runtime that shuts down ends
        // the wait, too.
        drop(self.descriptor.readable().await);
        self.reap();
    }

    fn reap(&self) {
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        // It is no failure if the process is not our child.
        let _: rustix::io::Result<_> =
            waitid(WaitId::PidFd(self.descriptor.get_ref().as_fd()), ended);
    }

    /// Kills the process. It is no error if the process has already ended.
    pub fn kill(&self) {
        let _: rustix::io::Result<()> = pidfd_send_signal(self.descriptor.get_ref(), Signal::KILL);
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.reap();
    }
}

/// Fields of `/proc/PID/stat`: proc_pid_stat(5).
struct Stat {
    state: char,
    started_ticks: u64,
    /// CPU time, in user and kernel mode.
    cpu_ticks: u64,
}

fn stat(pid: u32) -> io::Result<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, the command in parentheses, may hold any characters. After it, the state
    // is field 3, the CPU times are fields 14 and 15, and the start time is field 22.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let state = fields.next().and_then(|state| state.chars().next());
    let mut number = |skip| fields.nth(skip).and_then(|ticks| ticks.parse::<u64>().ok());
    let (user, kernel, started) = (number(10), number(0), number(6));
    let parsed = (|| {
        Some(Stat {
            state: state?,
            started_ticks: started?,
            cpu_ticks: user?.checked_add(kernel?)?,
        })
    })();
    let incomplete = || io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat is incomplete");
    parsed.ok_or_else(incomplete)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs::File;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use std::path::Path;

    use crate::process::{Detached, Streams};

    fn run(program: &str, arguments: &[&str]) -> Followed {
        let output = File::open("/dev/null").unwrap();
        let streams = Streams { output: &output, errors: &output };
        let arguments: Vec<_> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let detached = Detached {
            program: OsStr::new(program),
            arguments: &arguments,
            directory: Path::new("/"),
            environment: &[],
            inherited: &[],
            streams,
            confinement: None,
        };
        detached.spawn().unwrap()
    }

    fn sleeper() -> Followed {
        run("sleep", &["60"])
    }

    #[tokio::test]
    async fn process_is_followed_to_its_end_and_leaves_no_zombie() {
        let process = sleeper();
        process.kill();

        timeout(Duration::from_secs(5), process.ended()).await.unwrap();

        assert!(!Path::new(&format!("/proc/{}", process.id().pid)).exists());
    }

    #[tokio::test]
    async fn usage_of_a_process_is_measured_until_it_ends() {
        let process = run("sh", &["-c", "i=0; while :; do i=$((i+1)); done"]);
        let began = std::time::SystemTime::now();
        while process.usage().unwrap().cpu.is_zero() {
            assert!(began.elapsed().unwrap() < Duration::from_secs(30), "no CPU time was counted");
        }
        assert!(process.usage().unwrap().memory_bytes > 4096);

        process.kill();
        process.ended().await;

        assert!(process.usage().is_err());
    }

    #[tokio::test]
    async fn process_with_the_same_number_is_not_adopted() {
        let process = sleeper();
        let ProcessId { pid, started_ticks } = process.id();

        let other = Followed::adopt(ProcessId { pid, started_ticks: started_ticks + 1 });

        assert_eq!(other.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(Followed::adopt(process.id()).is_ok());
        process.kill();
        process.ended().await;
    }

    #[tokio::test]
    async fn zombie_is_not_adopted() {
        let process = sleeper();
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
    async fn process_is_found_by_a_unique_argument() {
        // `sleep` adds the second time to the first. A shell would not do: between fork and exec,
        // its child has the same command line.
        let argument = format!("0.{}", std::process::id());
        let process = run("sleep", &["60", &argument]);

        let found = Followed::find_by_argument("sleep", &argument).unwrap();

        assert_eq!(found.id(), process.id());
        assert!(Followed::find_by_argument("sh", &argument).is_err());
        process.kill();
        process.ended().await;
        assert_eq!(
            Followed::find_by_argument("sleep", &argument).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
