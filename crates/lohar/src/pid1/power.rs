//! Shutdown of the guest.

use std::process::ExitCode;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use rustix::system::{RebootCommand, reboot};
use tokio::time::{Instant, sleep};

use crate::Agent;
use crate::log;

/// How long processes may take to end after SIGTERM, and to disappear after SIGKILL.
const TERM_LIMIT: Duration = Duration::from_secs(2);
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// How often the agent checks whether processes have ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Sends the stop signals of the sessions that have one, then SIGTERM to every process, and then
/// SIGKILL to the remaining ones.
pub(super) async fn end_all_processes(agent: &Agent) {
    // Even without a process to wait for, sending the answer to the host takes a moment.
    sleep(LOOK_INTERVAL).await;
    let asked = agent.sessions.ask_to_end();
    let deadline = Instant::now() + TERM_LIMIT;
    while asked.iter().any(|session| session.is_running()) && Instant::now() < deadline {
        sleep(LOOK_INTERVAL).await;
    }
    for (signal, limit) in [(Signal::TERM, TERM_LIMIT), (Signal::KILL, KILL_LIMIT)] {
        signal_all(signal);
        let deadline = Instant::now() + limit;
        while another_process_is_there() && Instant::now() < deadline {
            sleep(LOOK_INTERVAL).await;
        }
    }
}

/// Syncs the disks and ends the VM by a restart. Every VMM is configured to exit on a restart,
/// and not all of them have a power switch.
pub(super) fn off() -> ExitCode {
    rustix::fs::sync();
    let error = reboot(RebootCommand::Restart);
    log::line(format_args!("failed to end the VM: {error:?}"));
    ExitCode::FAILURE
}

fn signal_all(signal: Signal) {
    for pid in processes() {
        // The process may have ended by now.
        let _: Result<(), Errno> = kill_process(pid, signal);
    }
}

fn another_process_is_there() -> bool {
    processes().any(|pid| test_kill_process(pid).is_ok())
}

/// Returns every process of user space except this one.
fn processes() -> impl Iterator<Item = Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid = entry
            .file_name()
            .to_str()?
            .parse()
            .ok()
            .filter(|pid| *pid > 1)
            .and_then(Pid::from_raw)?;
        // Kernel threads and zombies have no command line. Neither reacts to a signal.
        let is_process =
            std::fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty());
        is_process.then_some(pid)
    })
}
