//! The processes of one command: its process group and, in a VM, its own cgroup, which a process
//! cannot leave by `setsid`.
//!
//! The agent creates a cgroup only for commands that it may have to kill by itself (those with a
//! time limit, and sessions): in an emulated guest, a cgroup costs a command a few hundred
//! microseconds.

use std::cell::{Cell, RefCell};
use std::collections::{HashSet, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use tokio::time::sleep;

use crate::log;
use crate::surroundings::Surroundings;

/// The cgroup of all processes except the agent, in a VM.
pub(crate) const USER_CGROUP: &str = "/sys/fs/cgroup/user";

/// The most cgroups of commands at once. Beyond it, commands run in the users' cgroup itself.
const CGROUPS_MAX: usize = 1024;

/// The most cgroups that one sweep tries to remove.
const REMOVALS_PER_SWEEP: usize = 8;

/// The most processes of one command that the agent finds without a cgroup.
const DESCENDANTS_MAX: usize = 1024;

/// Whether a command gets a cgroup of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Confinement {
    Own,
    Shared,
}

/// The cgroups of commands.
#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    last_number: Cell<u64>,
    live: Cell<usize>,
    /// Cgroups of ended commands that still held other processes in the last sweep.
    left: RefCell<VecDeque<PathBuf>>,
}

impl Cgroups {
    /// Opens a cgroup for a command, or the users' cgroup if the command shares it or there are
    /// too many. Returns `None` outside a VM.
    pub(crate) fn open(
        self: &Rc<Self>,
        place: Surroundings,
        confinement: Confinement,
    ) -> io::Result<Option<Cgroup>> {
        if !place.has_kernel() || !fs::exists(USER_CGROUP)? {
            return Ok(None);
        }
        self.sweep();
        let is_full = self.live.get() + self.left.borrow().len() >= CGROUPS_MAX;
        if confinement == Confinement::Shared || is_full {
            return Ok(Some(Cgroup { path: None, cgroups: Rc::clone(self) }));
        }
        self.last_number.set(self.last_number.get() + 1);
        let path = PathBuf::from(format!("{USER_CGROUP}/command-{}", self.last_number.get()));
        fs::create_dir(&path)?;
        self.live.set(self.live.get() + 1);
        Ok(Some(Cgroup { path: Some(path), cgroups: Rc::clone(self) }))
    }

    /// Removes some of the cgroups that have no process any more.
    fn sweep(&self) {
        let mut left = self.left.borrow_mut();
        for _ in 0..REMOVALS_PER_SWEEP.min(left.len()) {
            if let Some(path) = left.pop_front()
                && let Err(error) = fs::remove_dir(&path)
                && error.kind() == io::ErrorKind::ResourceBusy
            {
                left.push_back(path);
            }
        }
    }
}

/// The cgroup of the processes of a command.
#[derive(Debug)]
pub(crate) struct Cgroup {
    /// The command's own cgroup; `None` is the users' cgroup.
    path: Option<PathBuf>,
    cgroups: Rc<Cgroups>,
}

impl Cgroup {
    /// Opens the file by which a child moves itself into this cgroup.
    pub(crate) fn procs(&self) -> io::Result<File> {
        let path = self.path.as_deref().unwrap_or(USER_CGROUP.as_ref());
        File::options().write(true).open(path.join("cgroup.procs"))
    }

    /// Kills every process in the cgroup. Returns false if it is not the command's own or the
    /// kill fails.
    fn kill(&self) -> bool {
        let Some(path) = &self.path else { return false };
        if let Err(error) = fs::write(path.join("cgroup.kill"), "1") {
            log::line(format_args!("failed to kill the processes in {}: {error}", path.display()));
            return false;
        }
        true
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let Some(path) = self.path.take() else { return };
        self.cgroups.live.set(self.cgroups.live.get() - 1);
        self.cgroups.left.borrow_mut().push_back(path);
        self.cgroups.sweep();
    }
}

/// The processes of one command.
#[derive(Debug)]
pub(crate) struct Processes {
    /// The command's first process, which leads the group of the same number.
    group: Pid,
    cgroup: Option<Cgroup>,
}

impl Processes {
    pub(crate) const fn new(group: Pid, cgroup: Option<Cgroup>) -> Self {
        Self { group, cgroup }
    }

    /// The process id of the command's first process.
    pub(crate) fn leader(&self) -> Pid {
        self.group
    }

    /// Signals the process group. Ignores a group that has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        let _: Result<(), Errno> = kill_process_group(self.group, signal);
    }

    /// Kills every process of the command, including those in other groups and sessions.
    pub(crate) fn kill(&self) {
        self.kill_remembered(&self.descendants());
    }

    /// Ends the command: signals its process group, and kills all of its remaining processes after
    /// `grace`. The kill does not depend on the caller.
    pub(crate) fn end(self: &Rc<Self>, signal: Signal, grace: Duration) {
        let remembered = self.remember();
        self.signal(signal);
        tokio::task::spawn_local(async move {
            sleep(grace).await;
            remembered.kill();
        });
    }

    /// Finds the command's processes, to be killed later. Without a cgroup, the children cannot be
    /// traced to the leader after it has ended.
    pub(crate) fn remember(self: &Rc<Self>) -> Remembered {
        Remembered { descendants: self.descendants(), processes: Rc::clone(self) }
    }

    /// Kills the processes in the command's cgroup or, without one, those of `descendants` that
    /// are left and their group.
    fn kill_remembered(&self, descendants: &[OwnedFd]) {
        if self.cgroup.as_ref().is_some_and(Cgroup::kill) {
            return;
        }
        let kill = |process: &&OwnedFd| pidfd_send_signal(process, Signal::KILL).is_ok();
        if descendants.iter().filter(kill).count() > 0 {
            // A process group keeps its number for as long as one of its processes lives.
            self.signal(Signal::KILL);
        }
    }

    /// Returns the processes of a command without its own cgroup: those in its group or session,
    /// and their descendants.
    fn descendants(&self) -> Vec<OwnedFd> {
        if self.cgroup.as_ref().is_some_and(|cgroup| cgroup.path.is_some()) {
            return Vec::new();
        }
        let found = descendants_of(self.group, &process_table());
        found.into_iter().filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect()
    }
}

/// The processes that a command had at one moment.
pub(crate) struct Remembered {
    processes: Rc<Processes>,
    descendants: Vec<OwnedFd>,
}

impl Remembered {
    /// Kills those that are left, and in a cgroup also those that were started since.
    pub(crate) fn kill(&self) {
        self.processes.kill_remembered(&self.descendants);
    }
}

/// One process, as read from `/proc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: Pid,
    parent: Option<Pid>,
    group: Option<Pid>,
    session: Option<Pid>,
}

fn process_table() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let stats = entries.filter_map(|entry| {
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        fs::read_to_string(entry.path().join("stat")).ok()
    });
    stats.filter_map(|stat| parse_stat(&stat)).collect()
}

/// Parses the first fields of `/proc/PID/stat`; see proc(5). The name, in parentheses, may
/// contain any character.
fn parse_stat(stat: &str) -> Option<Process> {
    let (pid, rest) = stat.split_once(' ')?;
    let mut fields = rest.rsplit_once(')')?.1.split_ascii_whitespace().skip(1);
    let mut number = || fields.next()?.parse().ok();
    let (parent, group, session) = (number()?, number()?, number()?);
    Some(Process {
        pid: Pid::from_raw(pid.parse().ok()?)?,
        parent: Pid::from_raw(parent),
        group: Pid::from_raw(group),
        session: Pid::from_raw(session),
    })
}

/// Returns the processes in the group or session of that number, and their descendants.
fn descendants_of(group: Pid, table: &[Process]) -> HashSet<Pid> {
    let mut found = HashSet::new();
    loop {
        let before = found.len();
        for process in table {
            let belongs = [process.group, process.session].contains(&Some(group))
                || process.parent.is_some_and(|parent| found.contains(&parent));
            if belongs && found.len() < DESCENDANTS_MAX {
                found.insert(process.pid);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descendants_include_other_sessions_and_exclude_strangers() {
        let table: Vec<Process> = [
            "10 (sh) S 1 10 10 0 -1",
            "11 (a) b) S 10 10 10 0 -1",
            "12 (setsid) S 11 12 12 0 -1",
            "13 (child) S 12 12 12 0 -1",
            "20 (other) S 1 20 20 0 -1",
        ]
        .into_iter()
        .map(|stat| parse_stat(stat).unwrap())
        .collect();

        let found = descendants_of(Pid::from_raw(10).unwrap(), &table);

        let mut pids: Vec<i32> = found.into_iter().map(Pid::as_raw_pid).collect();
        pids.sort_unstable();
        assert_eq!(pids, [10, 11, 12, 13]);
    }
}
