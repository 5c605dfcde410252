//! PID 1 of a container: the host has set up everything that a VM sets up at boot, and the agent
//! must not change the host's kernel.
//!
//! The host reaches the agent by two sockets in a directory that only the host and this container
//! share.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use tokio::task::LocalSet;

use super::{enter_workspace, power};
use crate::Agent;
use crate::limits::Limits;
use crate::log;
use crate::reaper::Reaper;
use crate::runtime;
use crate::surroundings::{STATE_DIR, Surroundings};
use crate::unix::Listeners;

/// The environment variable that the host sets in a container.
const VARIABLE: &str = "LOHAR_CONTAINER";

/// The directory that is shared with the host.
const SHARED: &str = "/run/bhatti";

/// Whether the agent runs in a container.
pub(super) fn is_one() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|value| value == "1")
}

/// Serves until the host requests a shutdown.
pub(super) fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::line(format_args!("failed to serve in the container: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    enter_workspace()?;
    let runtime = runtime()?;
    LocalSet::new().block_on(&runtime, async {
        let agent = Agent::new(
            Reaper::start()?,
            Limits::default(),
            STATE_DIR.into(),
            Surroundings::Container,
        );
        let shared = Path::new(SHARED);
        let listeners =
            Listeners::open(&shared.join("control.sock"), &shared.join("forward.sock"))?;
        let shut_down = async {
            agent.shutdown_requested().await;
            power::end_all_processes(&agent).await;
        };
        tokio::select! {
            () = listeners.serve(&agent) => {}
            () = shut_down => {}
        }
        Ok(())
    })
}
