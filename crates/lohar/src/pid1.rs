//! The life of PID 1: sets up the guest, serves the channel, powers off.
//!
//! ```text
//!  load modules ─► find the root disk ─► switch to it ─► mount the rest, links up ─► serve
//!                                                                                      │
//!                                                                         power off ◄──┘
//! ```
//!
//! If a step fails without which the guest cannot run, the guest ends: the console has the
//! reason, the VMM exits, and the host reports both.

mod container;
mod disk_growth;
mod modules;
mod mounts;
mod power;
mod root;
mod sysctls;

use std::fmt;
use std::io;
use std::process::ExitCode;
use std::rc::Rc;

use rustix::process::{DumpableBehavior, chdir, set_dumpable_behavior};
use tokio::task::LocalSet;

use crate::Agent;
use crate::limits::Limits;
use crate::reaper::Reaper;
use crate::surroundings::{STATE_DIR, Surroundings};
use crate::vsock::Vsock;
use crate::{channel, log, netlink, oom, runtime};

/// A step of the boot that failed.
#[derive(Debug)]
struct BootError {
    step: &'static str,
    cause: io::Error,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed to {}: {}", self.step, self.cause)
    }
}

/// Names the step that a result came from.
trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, BootError> {
        self.map_err(|cause| BootError { step, cause: cause.into() })
    }
}

/// Runs the guest until its power-off.
pub(crate) fn run() -> ExitCode {
    // Regardless of `fs.suid_dumpable`: children that run as other users borrow this memory.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        log::line(format_args!("failed to keep the agent's memory from being traced: {error}"));
    }
    if container::is_one() {
        return container::run();
    }
    if let Err(error) = boot_and_serve() {
        log::line(format_args!("{error}"));
    }
    power::off()
}

fn boot_and_serve() -> Result<(), BootError> {
    mounts::early().step("mount the early file systems")?;
    modules::load().step("load the kernel modules")?;
    let loadable = modules::keep_loadable().step("keep the loadable modules")?;
    let disk = root::find_disk().step("find the root disk")?;
    let disk = root::await_file_system(disk).step("wait for the root disk's file system")?;
    root::switch_to(&disk).step("mount the root disk")?;
    mounts::late();
    for (step, done) in [
        ("offer the loadable modules", loadable.as_ref().map_or(Ok(()), modules::offer)),
        ("share mounts with namespaces", mounts::share()),
        ("grow the root file system to the size of its disk", disk_growth::grow(&disk)),
        ("bring the loopback up", netlink::loopback_up()),
        ("bring the network card up", netlink::card_up()),
        ("protect the agent's memory", oom::protect_agent()),
        ("set the kernel's parameters", sysctls::set()),
    ] {
        if let Err(error) = done {
            log::line(format_args!("failed to {step}: {error}"));
        }
    }
    enter_workspace().step("enter /workspace")?;

    let runtime = runtime().step("start the runtime")?;
    LocalSet::new().block_on(&runtime, async {
        let reaper = Reaper::start().step("watch for children")?;
        let agent = Agent::new(reaper, Limits::default(), STATE_DIR.into(), Surroundings::Machine);
        tokio::task::spawn_local(oom::report_kills(Rc::clone(&agent)));
        // The channel is served meanwhile, so that the host gets the answer to its request.
        let shut_down = async {
            agent.shutdown_requested().await;
            power::end_all_processes(&agent).await;
        };
        tokio::select! {
            served = serve(&agent) => served.step("serve the agent channel"),
            () = shut_down => Ok(()),
        }
    })
}

fn enter_workspace() -> io::Result<()> {
    Ok(chdir(if std::fs::metadata("/workspace").is_ok() { "/workspace" } else { "/" })?)
}

/// Serves the host over the channels that the hypervisor provides.
async fn serve(agent: &Rc<Agent>) -> io::Result<()> {
    let Some(vsock) = Vsock::open()? else { return channel::serve(agent).await };
    let port = async {
        match channel::serve(agent).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => std::future::pending().await,
            served => served,
        }
    };
    tokio::select! {
        served = port => served,
        () = vsock.serve(agent) => Ok(()),
    }
}
