//! Starts helper programs, and processes that outlive the daemon.

mod confine;
mod follow;
mod jail;

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
pub use jail::{JailLimits, enter_jail};

/// Directories that are searched for programs, independent of the caller's environment.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Prepares a helper program: its environment has only `PATH` and a neutral locale, it has no
/// standard input, and it is killed when its handle is dropped.
pub fn command(program: impl AsRef<OsStr>) -> tokio::process::Command {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the function that the lint's rule points to"
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

/// Whether this process can run other processes as [`USERS`] and give files to these users: it is
/// root, has the capabilities for that, and its user namespace has all of these users. Root in a
/// container often cannot.
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

/// Whether a user namespace's map has all of [`USERS`], and the user id just before them.
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
    // SAFETY: between fork and exec `enter` makes only system calls that are async-signal-safe,
    // and allocates nothing.
    #[expect(unsafe_code, reason = "the child must be prepared between fork and exec")]
    unsafe {
        command.pre_exec(move || confinement.enter());
    }
}

/// The ids of the users that confined programs run as: 2^28 ids that no system assigns (unused in
/// systemd's "Users, Groups, UIDs and GIDs").
pub const USERS: std::ops::Range<u32> = 0x7000_0000..0x8000_0000;

/// glibc's parameter for how much unused memory a heap may keep at its end, and its value in
/// bytes.
#[cfg(target_env = "gnu")]
const M_TRIM_THRESHOLD: c_int = -1;
#[cfg(target_env = "gnu")]
const KEPT_BYTES: c_int = 128 * 1024;

#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no crate wraps this call")]
unsafe extern "C" {
    /// See mallopt(3).
    fn mallopt(parameter: c_int, value: c_int) -> c_int;
}

/// Sets up this process as a daemon. Only the owner can access the files that it creates, and it
/// may open as many files as the machine allows. After a peak, glibc returns the memory to the
/// machine (33 MiB shrink to 6 after a hundred commands at once). By default, glibc raises the
/// amount that it keeps with every large block that is freed. Call this before there are threads.
///
/// # Errors
///
/// Returns the error of raising the limit.
pub fn settle_daemon() -> io::Result<()> {
    umask(Mode::from_raw_mode(0o077));
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "no crate wraps this call")]
    // SAFETY: glibc has this function. It only sets a number, and its result says if it refuses.
    unsafe {
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES);
    }
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// Disables transparent huge pages for this process and for all processes that it starts from now
/// on.
///
/// # Errors
///
/// Returns the kernel's error: the kernel is older than Linux 3.15, or a seccomp filter refuses
/// the call.
pub fn forgo_huge_pages() -> io::Result<()> {
    Ok(disable_transparent_huge_pages(true)?)
}

/// The files that a process's output goes to.
#[derive(Clone, Copy, Debug)]
pub struct Streams<'a> {
    /// Standard output.
    pub output: &'a File,
    /// Standard error.
    pub errors: &'a File,
}

/// A process that outlives the process that starts it. It has a session of its own, an
/// environment of `PATH` and the given variables, and inherits only the given descriptors and the
/// output streams.
pub struct Detached<'a> {
    /// The program: a path, or a name to look up in `PATH`.
    pub program: &'a OsStr,
    /// The program's arguments.
    pub arguments: &'a [String],
    /// Working directory.
    pub directory: &'a Path,
    /// Environment variables beside `PATH`.
    pub environment: &'a [(&'a str, &'a str)],
    /// Descriptors that the process inherits under the same numbers.
    pub inherited: &'a [BorrowedFd<'a>],
    /// The files that its output goes to.
    pub streams: Streams<'a>,
    /// Restrictions that apply from its first instruction on.
    pub confinement: Option<Confinement>,
}

impl Detached<'_> {
    /// Starts the process.
    ///
    /// # Errors
    ///
    /// Returns the error of starting the process; [`io::ErrorKind::NotFound`] if there is no such
    /// program.
    pub fn spawn(self) -> io::Result<Followed> {
        let Self { program, arguments, directory, environment, inherited, streams, confinement } =
            self;
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the function that the lint's rule points to"
        )]
        let mut command = std::process::Command::new(program);
        command.args(arguments).env_clear().env("PATH", PATH).envs(environment.iter().copied());
        command.current_dir(directory).stdin(Stdio::null());
        command.stdout(streams.output.try_clone()?).stderr(streams.errors.try_clone()?);
        let descriptors: Vec<i32> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let prepare = move || {
            setsid()?;
            for descriptor in &descriptors {
                // SAFETY: the descriptors are borrowed for the duration of `spawn`, which is when
                // this runs.
                #[expect(unsafe_code, reason = "descriptors cross the fork as numbers")]
                let descriptor = unsafe { BorrowedFd::borrow_raw(*descriptor) };
                fcntl_setfd(descriptor, FdFlags::empty())?;
            }
            confinement.as_ref().map_or(Ok(()), Confinement::enter)
        };
        // SAFETY: between fork and exec `prepare` makes only system calls that are
        // async-signal-safe, and allocates nothing.
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
    fn namespace_with_few_users_does_not_cover_ours() {
        assert!(covers_users("         0          0 4294967295\n"));
        assert!(!covers_users("         0     100000      65536\n"));
        assert!(!covers_users(""));
    }
}
