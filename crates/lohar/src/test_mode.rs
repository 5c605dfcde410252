//! Test mode: the agent's protocol on two Unix sockets, without root and without a VM.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use rustix::process::{getpid, set_child_subreaper};
use tokio::task::LocalSet;

use crate::Agent;
use crate::limits::Limits;
use crate::log;
use crate::reaper::Reaper;
use crate::runtime;
use crate::surroundings::Surroundings;
use crate::unix::Listeners;

/// Serves until killed.
pub(crate) fn run() -> ExitCode {
    let sockets = (std::env::var_os("LOHAR_SOCK"), std::env::var_os("LOHAR_FWD_SOCK"));
    let (Some(control), Some(forward)) = sockets else {
        log::line(format_args!("LOHAR_SOCK and LOHAR_FWD_SOCK required"));
        return ExitCode::FAILURE;
    };
    // As PID 1 does: this process reaps the orphans of commands, regardless of the machine's own
    // PID 1.
    if let Err(error) = set_child_subreaper(Some(getpid())) {
        log::line(format_args!("failed to adopt orphans: {error}"));
    }
    match serve(Path::new(&control), Path::new(&forward)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::line(format_args!("test mode failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(control: &Path, forward: &Path) -> io::Result<()> {
    let runtime = runtime()?;
    LocalSet::new().block_on(&runtime, async {
        let listeners = Listeners::open(control, forward)?;
        let state_dir =
            std::env::var_os("LOHAR_STATE_DIR").map_or_else(std::env::temp_dir, Into::into);
        let agent = Agent::new(Reaper::start()?, limits()?, state_dir, Surroundings::Process);
        log::line(format_args!("test mode ready"));
        tokio::select! {
            () = listeners.serve(&agent) => {}
            () = agent.shutdown_requested() => {}
        }
        Ok(())
    })
}

/// Returns the default limits, overridden by the JSON in `LOHAR_LIMITS`.
fn limits() -> io::Result<Limits> {
    let set = std::env::var("LOHAR_LIMITS").ok();
    set.map_or_else(
        || Ok(Limits::default()),
        |json| serde_json::from_str(&json).map_err(io::Error::from),
    )
}
