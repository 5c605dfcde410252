//! File descriptors: the agent needs several for each command and connection, and its children have what programs expect.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::agent::Place;
use crate::log;

/// What processes have in a machine: what systemd gives. More to begin with breaks programs that use `select` or close all there could be.
const USUAL: Rlimit = Rlimit { current: Some(1024), maximum: Some(512 << 10) };

/// Lets the agent have as many as it can, and tells how many its children are to begin with.
pub(crate) fn raise_limit(place: Place) -> Option<u64> {
    let usual = match place {
        Place::Machine => USUAL,
        Place::Container | Place::Process => getrlimit(Resource::Nofile),
    };
    let most = Rlimit { current: usual.maximum, maximum: usual.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        log::line(format_args!("failed to raise the limit of open files: {error}"));
    }
    usual.current
}

/// Has a child begin with so many. What it may have at most is what the agent may.
pub(crate) fn lower_limit(usual: Option<u64>) -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let lowest = [usual, current, maximum].into_iter().flatten().min();
    Ok(setrlimit(Resource::Nofile, Rlimit { current: lowest, maximum })?)
}
