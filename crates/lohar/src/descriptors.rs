//! Limits of file descriptors. The agent needs several descriptors for each command and
//! connection; its children get the limit that programs expect.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::log;
use crate::surroundings::Surroundings;

/// The limits of a process in a VM, as systemd sets them. A higher soft limit breaks programs
/// that use `select` or close every possible descriptor.
const USUAL: Rlimit = Rlimit { current: Some(1024), maximum: Some(512 << 10) };

/// Raises the agent's soft limit to the hard limit, and returns the soft limit for its children.
pub(crate) fn raise_limit(place: Surroundings) -> Option<u64> {
    let usual = match place {
        Surroundings::Machine => USUAL,
        Surroundings::Container | Surroundings::Process => getrlimit(Resource::Nofile),
    };
    let most = Rlimit { current: usual.maximum, maximum: usual.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        log::line(format_args!("failed to raise the limit of open files: {error}"));
    }
    usual.current
}

/// Lowers the soft limit of the calling child process to `usual`. The hard limit stays the
/// agent's.
pub(crate) fn lower_limit(usual: Option<u64>) -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let lowest = [usual, current, maximum].into_iter().flatten().min();
    Ok(setrlimit(Resource::Nofile, Rlimit { current: lowest, maximum })?)
}
