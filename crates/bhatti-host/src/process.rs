//! Starts processes, and follows those that outlive us.

mod confine;
mod follow;

use std::ffi::OsStr;
#[cfg(target_env = "gnu")]
use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::OnceLock;

use rustix::fs::Mode;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, setsid, umask};
use rustix::thread::{CapabilitySet, disable_transparent_huge_pages};

pub use confine::{Confinement, Reach, User, landlock_version};
pub use follow::{Followed, ProcessId, Usage};

/// Where programs are looked for, whatever the caller's environment says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A helper program: an environment of `PATH` and a neutral locale, no standard input, killed when its handle is dropped.
pub fn command(program: impl AsRef<OsStr>) -> tokio::process::Command {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the place that the rule sends everybody to"
    )]
    let mut command = tokio::process::Command::new(program);
    command
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Whether this process has root's rights.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this process can have others run as [`USERS`] and give files to them: it is root, has
/// the capabilities for that, and is in no user namespace that lacks these users. Root in a
/// container often is not.
#[must_use]
pub fn can_use_users() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let needed = CapabilitySet::CHOWN
            | CapabilitySet::SETUID
            | CapabilitySet::SETGID
            | CapabilitySet::DAC_READ_SEARCH;
        let permitted = rustix::thread::capabilities(None).map(|sets| sets.permitted);
        let maps = ["/proc/self/uid_map", "/proc/self/gid_map"].map(std::fs::read_to_string);
        is_root()
            && permitted.is_ok_and(|permitted| permitted.contains(needed))
            && maps.into_iter().all(|map| map.is_ok_and(|map| covers_users(&map)))
    })
}

/// Whether a map of a user namespace has all of [`USERS`], and the one before them.
fn covers_users(map: &str) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> =
            line.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        let &[first, _, count] = &numbers[..] else { return false };
        first < u64::from(USERS.start) && first + count >= u64::from(USERS.end)
    })
}

/// Confines a helper program from its first instruction on.
pub fn confine(command: &mut tokio::process::Command, confinement: Confinement) {
    // SAFETY: between fork and exec `enter` makes only system calls that are async-signal-safe, and allocates nothing.
    #[expect(unsafe_code, reason = "the child must be prepared between fork and exec")]
    unsafe {
        command.pre_exec(move || confinement.enter());
    }
}

/// The numbers of users that confined programs run as: 2^28 that no system assigns (unused in
/// systemd's "Users, Groups, UIDs and GIDs").
pub const USERS: std::ops::Range<u32> = 0x7000_0000..0x8000_0000;

/// glibc's name for how much a heap may keep at its end of what is not used any more, and that in bytes.
#[cfg(target_env = "gnu")]
const M_TRIM_THRESHOLD: c_int = -1;
#[cfg(target_env = "gnu")]
const KEPT_BYTES: c_int = 128 * 1024;

#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no crate has this call")]
unsafe extern "C" {
    /// See mallopt(3).
    fn mallopt(parameter: c_int, value: c_int) -> c_int;
}

/// Settles this process as a daemon: what it makes is its owner's alone, and it may open as many files as the machine lets it. Memory
/// that it needed at its busiest goes back to the machine (33 MiB are 6 after a hundred commands at once): unless told, glibc raises what it
/// keeps with every large piece that is freed. To be called before there are threads.
///
/// # Errors
///
/// Returns the error of raising the limit.
pub fn settle_daemon() -> io::Result<()> {
    umask(Mode::from_raw_mode(0o077));
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "no crate has this call")]
    // SAFETY: glibc has this function; it only sets a number, and refuses by its answer.
    unsafe {
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES);
    }
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// Takes huge pages from this process and from all that it starts from now on.
///
/// # Errors
///
/// Returns the kernel's error: it is older than Linux 3.15, or a filter of system calls is in the way.
pub fn forgo_huge_pages() -> io::Result<()> {
    Ok(disable_transparent_huge_pages(true)?)
}

/// Where a process writes.
#[derive(Clone, Copy, Debug)]
pub struct Streams<'a> {
    /// Its output.
    pub output: &'a File,
    /// What it says of errors.
    pub errors: &'a File,
}

/// A process that is to outlive its starter: a session of its own, an environment of `PATH` and what is named, nothing inherited but what is
/// named and the output streams.
pub struct Detached<'a> {
    /// The program, a path or a name to look up.
    pub program: &'a OsStr,
    /// Its arguments.
    pub arguments: &'a [String],
    /// Where it starts.
    pub directory: &'a Path,
    /// Variables beside `PATH`.
    pub environment: &'a [(&'a str, &'a str)],
    /// Descriptors that it has under the same numbers.
    pub inherited: &'a [BorrowedFd<'a>],
    /// Where it writes.
    pub streams: Streams<'a>,
    /// What it is kept from, from its first instruction on.
    pub confinement: Option<Confinement>,
}

impl Detached<'_> {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// Returns the error of starting it; [`io::ErrorKind::NotFound`] if there is no such program.
    pub fn spawn(self) -> io::Result<Followed> {
        let Self { program, arguments, directory, environment, inherited, streams, confinement } =
            self;
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the place that the rule sends everybody to"
        )]
        let mut command = std::process::Command::new(program);
        command.args(arguments).env_clear().env("PATH", PATH).envs(environment.iter().copied());
        command.current_dir(directory).stdin(Stdio::null());
        command.stdout(streams.output.try_clone()?).stderr(streams.errors.try_clone()?);
        let descriptors: Vec<i32> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let prepare = move || {
            setsid()?;
            for descriptor in &descriptors {
                // SAFETY: the descriptors are borrowed for the duration of `spawn`, which is when this runs.
                #[expect(unsafe_code, reason = "descriptors cross the fork as numbers")]
                let descriptor = unsafe { BorrowedFd::borrow_raw(*descriptor) };
                fcntl_setfd(descriptor, FdFlags::empty())?;
            }
            confinement.as_ref().map_or(Ok(()), Confinement::enter)
        };
        // SAFETY: between fork and exec `prepare` makes only system calls that are async-signal-safe, and allocates nothing.
        #[expect(unsafe_code, reason = "the child must be prepared between fork and exec")]
        unsafe {
            command.pre_exec(prepare);
        }
        let child = command.spawn()?;
        Followed::child(child.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespace_with_few_users_has_none_for_programs() {
        assert!(covers_users("         0          0 4294967295\n"));
        assert!(!covers_users("         0     100000      65536\n"));
        assert!(!covers_users(""));
    }
}
