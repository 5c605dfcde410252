//! Memory limits: the agent never runs out of memory, and reports the processes that do.
//!
//! All processes except the agent are in one cgroup, whose limits leave memory, threads and half
//! a processor to the agent. If the kernel kills one of these processes for lack of memory, the
//! kernel's log names the process, and the agent sends an event.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bhatti_proto::GuestEvent;
use rustix::fs::{Mode, OFlags, SeekFrom, open, seek};
use rustix::io::Errno;
use tokio::io::Interest;

use crate::Agent;
use crate::log;
use crate::processes::USER_CGROUP;
use crate::watched::watch;

/// Memory that user processes cannot use, in bytes: for the agent, and for the kernel that serves
/// it.
const RESERVED_BYTES: u64 = 24 << 20;

/// The share of the kernel's threads that processes may have, in percent.
const THREADS_PERCENT: u64 = 90;

/// The longest record of the kernel's log: `CONSOLE_EXT_LOG_MAX` of kernel/printk.
const RECORD_BYTES: usize = 8192;

/// Protects the agent: sets up the cgroup of all other processes. The kernel never kills PID 1
/// for lack of memory, so the agent needs no OOM score that its children would have to reset.
pub(crate) fn protect_agent() -> io::Result<()> {
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids")?;
    fs::create_dir_all(USER_CGROUP)?;
    let memory = total_memory()?.saturating_sub(RESERVED_BYTES);
    fs::write(format!("{USER_CGROUP}/memory.max"), memory.to_string())?;
    let threads: u64 = fs::read_to_string("/proc/sys/kernel/threads-max")?
        .trim()
        .parse()
        .map_err(io::Error::other)?;
    fs::write(format!("{USER_CGROUP}/pids.max"), (threads * THREADS_PERCENT / 100).to_string())
}

fn total_memory() -> io::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 = line
        .unwrap_or_default()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .map_err(io::Error::other)?;
    Ok(kib << 10)
}

/// Reports each process that the kernel kills for lack of memory, for as long as the guest runs.
pub(crate) async fn report_kills(agent: Rc<Agent>) {
    if let Err(error) = try_report_kills(&agent).await {
        log::line(format_args!("failed to follow the kernel's log: {error}"));
    }
}

async fn try_report_kills(agent: &Agent) -> io::Result<()> {
    let kernel_log =
        open("/dev/kmsg", OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    seek(&kernel_log, SeekFrom::End(0))?;
    let kernel_log = watch(kernel_log, Interest::READABLE)?;
    let mut record = vec![0; RECORD_BYTES];
    let mut kills = Kills::default();
    loop {
        let mut ready = kernel_log.readable().await?;
        match read(kernel_log.get_ref(), &mut record) {
            Ok(length) => {
                if let Some(event) = kills.read(&String::from_utf8_lossy(&record[..length])) {
                    // Sending fails only without a listener.
                    drop(agent.events.send(event));
                }
            }
            Err(Errno::AGAIN) => ready.clear_ready(),
            // Records were overwritten before they were read.
            Err(Errno::PIPE) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn read(kernel_log: &OwnedFd, record: &mut [u8]) -> rustix::io::Result<usize> {
    rustix::io::read(kernel_log, record)
}

/// Parses the two records of a kill in the kernel's log:
/// `oom-kill:…,task_memcg=/user/x,task=name,pid=123,uid=0` and `… Killed process 123 (name) …`
/// (`dump_oom_summary` and `__oom_kill_process` of mm/oom_kill.c, Linux 6.1).
#[derive(Default)]
struct Kills {
    /// The process of the last record of the first kind, and its cgroup.
    chosen: Option<(u32, String)>,
}

impl Kills {
    /// Parses a record. Returns the kill that it reports.
    fn read(&mut self, record: &str) -> Option<GuestEvent> {
        if let Some((_, rest)) = record.split_once("oom-kill:") {
            self.chosen = parse_chosen(rest);
            return None;
        }
        let (_, rest) = record.split_once("Killed process ")?;
        let (pid, rest) = rest.split_once(" (")?;
        let pid = pid.parse().ok()?;
        // The name may contain parentheses; the text after it does not.
        let (name, _) = rest.rsplit_once(") ").or_else(|| rest.rsplit_once("),"))?;
        let chosen = self.chosen.as_ref().filter(|(chosen, _)| *chosen == pid);
        let cgroup = chosen.map(|(_, cgroup)| cgroup.clone());
        Some(GuestEvent::OomKill { pid, name: name.to_owned(), cgroup })
    }
}

fn parse_chosen(record: &str) -> Option<(u32, String)> {
    let (_, rest) = record.split_once(",task_memcg=")?;
    let (cgroup, rest) = rest.split_once(",task=")?;
    let (_, pid) = rest.rsplit_once(",pid=")?;
    let pid = pid.split(',').next()?.parse().ok()?;
    Some((pid, cgroup.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kill_is_parsed_from_the_kernel_log() {
        let mut kills = Kills::default();
        let chosen = "6,1020,8235710,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/user,task_memcg=/user/exec-7,task=my (odd) name,pid=213,uid=0\n";
        let record = "3,1021,8235711,-;Memory cgroup out of memory: Killed process 213 (my (odd) name) total-vm:9kB, anon-rss:1kB\n";

        let kill = |cgroup: Option<&str>| {
            let (name, cgroup) = ("my (odd) name".to_owned(), cgroup.map(str::to_owned));
            Some(GuestEvent::OomKill { pid: 213, name, cgroup })
        };
        assert_eq!(kills.read(record), kill(None));
        assert_eq!(kills.read(chosen), None);
        assert_eq!(kills.read("6,1,2,-;random: crng reseeded\n"), None);
        assert_eq!(kills.read(record), kill(Some("/user/exec-7")));
    }
}
