//! lohar, the guest agent.
//!
//! ```text
//!  run ──┬─ pid1      brings the guest up, then serves the virtio-serial channel and vsock; powers off on request;
//!        │            in a container, serves two Unix sockets
//!        ├─ test mode serves the same protocol on two Unix sockets, without root and without a VM
//!        └─ modprobe  loads a kernel module, when the kernel or a program calls this program by that name
//!
//!  serve      one connection = one operation; authentication, limits, dispatch
//!  exec       runs a command, its output in frames
//!  session    processes that survive their client: terminals, and jobs that keep their output
//!  file       reads, writes, lists, changes and watches files
//!  forward    relays a connection to a TCP port of the loopback
//!  settings   what the host made of this guest, after the boot and after each restore
//!  suspend    stands still around a snapshot
//!  launch     starts a process as the right user in the right place
//!  spawn      starts a program without a copy of the agent's memory
//!  processes  signals and kills all processes of a command
//!  discard    reads what background processes write after their command has ended
//!  reaper     waits for every process that was started
//! ```
//!
//! Everything runs on one thread: starting a child and registering it with the reaper cannot be torn apart by its exit. What may wait for
//! a file system runs on threads of a pool (`file/worker.rs`).

mod agent;
mod channel;
mod connection;
mod descriptors;
mod discard;
mod disk;
mod exec;
mod file;
mod forward;
mod image_environment;
mod launch;
mod limits;
mod log;
mod lookup;
mod modprobe;
mod netlink;
mod oom;
mod pid1;
mod processes;
mod reaper;
mod refusal;
pub mod ring;
mod serve;
mod session;
mod settings;
mod spawn;
mod suspend;
mod test_mode;
mod unix;
mod user;
mod vsock;
mod watched;

use std::process::ExitCode;

/// The stack of a thread that waits for files, in bytes. Nothing there is recursive.
const FILE_THREAD_STACK_BYTES: usize = 512 << 10;

/// The runtime: one thread that serves everything, and those that wait for files and disks.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(FILE_THREAD_STACK_BYTES)
        .build()
}

/// Runs the agent: as PID 1 of a guest, or in test mode. Called as `modprobe`, loads kernel modules and ends.
pub fn run() -> ExitCode {
    if modprobe::is_called() {
        return modprobe::run();
    }
    keep_heap();
    if std::env::var_os("LOHAR_TEST").is_some_and(|value| value == "1") {
        return test_mode::run();
    }
    if std::process::id() == 1 {
        return pid1::run();
    }
    // As an ordinary process it would mount over, kill and power off a machine that is not its own.
    log::line(format_args!(
        "refusing to run: this is not PID 1 of a virtual machine or container (set LOHAR_TEST=1 for test mode)"
    ));
    ExitCode::FAILURE
}

#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no crate has this call")]
unsafe extern "C" {
    /// See mallopt(3).
    fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
}

/// Keeps up to a mebibyte that is not used at the heap's end: to give it back and take it again is 80 functions of the kernel, which an
/// emulated guest has to translate before it answers. Threads share the heap: one of its own for each would be memory that is not given back.
fn keep_heap() {
    /// glibc's name for that.
    #[cfg(target_env = "gnu")]
    const M_TRIM_THRESHOLD: std::ffi::c_int = -1;
    /// The same for the number of heaps.
    #[cfg(target_env = "gnu")]
    const M_ARENA_MAX: std::ffi::c_int = -8;
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "no crate has this call")]
    // SAFETY: glibc has this function; it only sets a number, and refuses by its answer.
    unsafe {
        mallopt(M_TRIM_THRESHOLD, 1 << 20);
        mallopt(M_ARENA_MAX, 1);
    }
}
