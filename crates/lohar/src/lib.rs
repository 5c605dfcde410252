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
mod clock;
mod connection;
mod descriptors;
mod discard;
mod disk;
mod exec;
mod file;
mod forward;
mod image_environment;
mod input;
mod launch;
mod limits;
mod load;
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
mod surroundings;
mod suspend;
mod test_mode;
mod unix;
mod user;
mod vsock;
mod watched;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use bhatti_proto::GuestEvent;
use tokio::sync::{Notify, broadcast};

use file::Workers;
use limits::Limits;
use processes::{Cgroups, Processes};
use reaper::Reaper;
use session::Sessions;
use settings::Settings;
use surroundings::Surroundings;

/// Events that a slow listener may fall behind before it loses some.
const EVENT_QUEUE: usize = 64;

/// The agent: the state that all connections share.
pub(crate) struct Agent {
    /// Reaps child processes.
    pub(crate) reaper: Rc<Reaper>,
    /// The agent's limits.
    pub(crate) limits: Limits,
    /// The settings that the host applied.
    pub(crate) settings: RefCell<Settings>,
    /// Variables that the image sets for every process.
    pub(crate) image_environment: BTreeMap<String, String>,
    /// Processes that survive their client.
    pub(crate) sessions: Sessions,
    /// Sends events of the guest to listeners.
    pub(crate) events: broadcast::Sender<GuestEvent>,
    /// The directory of job output and of jobs that restart.
    pub(crate) state_dir: PathBuf,
    /// Where the agent runs, which decides how much of the system it may change.
    pub(crate) place: Surroundings,
    /// The soft limit of descriptors for children, which is lower than that of the agent.
    pub(crate) child_descriptors: Option<u64>,
    /// Threads for file operations.
    pub(crate) file_workers: Workers,
    /// The cgroups of commands.
    pub(crate) cgroups: Rc<Cgroups>,
    commands: RefCell<HashMap<String, Rc<Processes>>>,
    running_commands: Cell<u32>,
    connections: Cell<usize>,
    watches: Cell<usize>,
    discarded_pipes: Cell<usize>,
    last_activity: Cell<i64>,
    /// The time of the CPUs when the host last asked for the load.
    cpu_ticks: Cell<load::CpuTicks>,
    shutdown_asked: Cell<bool>,
    shutdown: Notify,
    suspended: Cell<bool>,
    wakes: Cell<u64>,
    awake: Notify,
}

impl Agent {
    /// Creates an idle agent, and raises the limit of descriptors of its process to the maximum.
    pub(crate) fn new(
        reaper: Rc<Reaper>,
        limits: Limits,
        state_dir: PathBuf,
        place: Surroundings,
    ) -> Rc<Self> {
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        Rc::new(Self {
            reaper,
            limits,
            settings: RefCell::default(),
            image_environment: if place.is_guest() {
                image_environment::read()
            } else {
                BTreeMap::new()
            },
            sessions: Sessions::default(),
            events,
            state_dir,
            place,
            child_descriptors: descriptors::raise_limit(place),
            file_workers: Workers::new(
                limits.file_operations,
                Duration::from_millis(limits.file_wait_ms),
            ),
            cgroups: Rc::default(),
            commands: RefCell::default(),
            running_commands: Cell::new(0),
            connections: Cell::new(0),
            watches: Cell::new(0),
            discarded_pipes: Cell::new(0),
            last_activity: Cell::new(0),
            cpu_ticks: Cell::default(),
            shutdown_asked: Cell::new(false),
            shutdown: Notify::new(),
            suspended: Cell::new(false),
            wakes: Cell::new(0),
            awake: Notify::new(),
        })
    }
}

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
