//! lohar, the guest agent.
//!
//! ```text
//!  run ──┬─ pid1       sets up the guest, serves the virtio-serial channel and vsock, powers off
//!        │             on request; in a container, serves two Unix sockets
//!        ├─ test mode  serves the same protocol on two Unix sockets, without root and without a VM
//!        └─ modprobe   loads a kernel module, if the kernel or a program calls this program by
//!                      that name
//!
//!  serve      one connection = one operation; authentication, limits, dispatch
//!  exec       runs a command and sends its output in frames
//!  session    processes that survive their client: terminals, and jobs that keep their output
//!  file       reads, writes, lists, changes and watches files
//!  forward    relays a connection to a TCP port of the loopback
//!  settings   applies the host's settings: a configuration after a boot, an identity in a fork
//!  suspend    freezes the users' processes and volumes around a snapshot
//!  launch     starts a process as its user, in its cgroup and directory
//!  spawn      starts a program without a copy of the agent's memory
//!  processes  signals and kills all processes of a command
//!  discard    drains the pipes of background processes after their command has ended
//!  reaper     waits for every child process
//! ```
//!
//! Everything runs on one thread, so the reaper cannot reap a child between its start and its
//! registration. Operations that may block on a file system run on the threads of a pool
//! (`file/worker.rs`).

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

/// The stack of a thread for file operations, in bytes. No file operation walks a tree by
/// recursion.
const FILE_THREAD_STACK_BYTES: usize = 512 << 10;

/// Builds the runtime: one thread that serves everything, and a pool of threads that wait for
/// files and disks.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(FILE_THREAD_STACK_BYTES)
        .build()
}

/// Runs the agent, as PID 1 of a guest or in test mode. If it is called as `modprobe`, loads
/// kernel modules and exits instead.
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
    // As an ordinary process, the agent would mount over, kill and power off a machine that it
    // does not own.
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

/// Keeps up to 1 MiB of free memory at the end of the heap. To give that memory back and take it
/// again runs 80 kernel functions, which an emulated guest has to translate before the agent
/// answers. All threads share one heap: memory in a heap per thread would never be given back.
fn keep_heap() {
    /// Option of mallopt(3): the free bytes that stay at the end of the heap.
    #[cfg(target_env = "gnu")]
    const M_TRIM_THRESHOLD: std::ffi::c_int = -1;
    /// Option of mallopt(3): the number of heaps.
    #[cfg(target_env = "gnu")]
    const M_ARENA_MAX: std::ffi::c_int = -8;
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "no crate has this call")]
    // SAFETY: glibc has this function. It only sets a number, and returns 0 if it refuses.
    unsafe {
        mallopt(M_TRIM_THRESHOLD, 1 << 20);
        mallopt(M_ARENA_MAX, 1);
    }
}
