//! Test mode: the agent's protocol on two Unix sockets, without root and without a VM.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::LocalSet;

use crate::agent::Agent;
use crate::limits::Limits;
use crate::log;
use crate::reaper::Reaper;
use crate::serve::{ACCEPT_RETRY, spawn_control, spawn_forward};

/// Serves until killed.
pub(crate) fn run() -> ExitCode {
    let sockets = (std::env::var_os("LOHAR_SOCK"), std::env::var_os("LOHAR_FWD_SOCK"));
    let (Some(control), Some(forward)) = sockets else {
        log::line(format_args!("LOHAR_SOCK and LOHAR_FWD_SOCK required"));
        return ExitCode::FAILURE;
    };
    match serve(Path::new(&control), Path::new(&forward)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::line(format_args!("test mode failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(control: &Path, forward: &Path) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let (control, forward) = (listen(control)?, listen(forward)?);
        let state_dir =
            std::env::var_os("LOHAR_STATE_DIR").map_or_else(std::env::temp_dir, Into::into);
        let agent = Agent::new(Reaper::start()?, limits()?, state_dir, false);
        let forwarding = Rc::clone(&agent);
        tokio::task::spawn_local(async move { accept_forward(&forwarding, forward).await });
        log::line(format_args!("test mode ready"));
        tokio::select! {
            () = accept_control(&agent, control) => {}
            () = agent.shutdown_requested() => {}
        }
        Ok(())
    })
}

/// The limits, with those that `LOHAR_LIMITS` sets in JSON.
fn limits() -> io::Result<Limits> {
    let set = std::env::var("LOHAR_LIMITS").ok();
    set.map_or_else(
        || Ok(Limits::default()),
        |json| serde_json::from_str(&json).map_err(io::Error::from),
    )
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

async fn accept_control(agent: &Rc<Agent>, listener: UnixListener) {
    loop {
        spawn_control(agent, accept(&listener).await);
    }
}

async fn accept_forward(agent: &Rc<Agent>, listener: UnixListener) {
    loop {
        spawn_forward(agent, accept(&listener).await);
    }
}

/// Accepts the next connection. Out of files or memory, it waits for some to be given back.
async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                log::line(format_args!("failed to accept a connection: {error}"));
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
