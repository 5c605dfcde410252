//! The agent's limits.

use std::time::Duration;

use serde::Deserialize;

/// The longest path, in bytes: the kernel's `PATH_MAX`.
pub(crate) const PATH_BYTES_MAX: usize = 4096;

/// Entries in a listing for hosts that take only one frame.
pub(crate) const LISTING_ENTRIES_MAX: usize = 10_000;

/// The most output that a job may be asked to keep, in bytes.
pub(crate) const JOB_OUTPUT_BYTES_MAX: u64 = 1 << 30;

/// The longest tag of a session, in bytes.
pub(crate) const TAG_BYTES_MAX: usize = 256;

/// The longest note of a session, in bytes.
pub(crate) const NOTE_BYTES_MAX: usize = 4 << 10;

/// How long a connection may take to authenticate.
pub(crate) const AUTH_LIMIT: Duration = Duration::from_secs(5);

/// The time between SIGTERM and SIGKILL for a process group.
pub(crate) const TERM_GRACE: Duration = Duration::from_secs(2);

/// The longest time between a session's stop signal and SIGKILL.
pub(crate) const STOP_GRACE_MAX: Duration = Duration::from_hours(1);

/// Limits that tests set lower. In a VM they are the defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Limits {
    /// Connections at once.
    pub(crate) connections: usize,
    /// Sessions whose process runs.
    pub(crate) sessions: usize,
    /// Running sessions with a terminal, which count as sessions, too. Each keeps 64 KiB of
    /// output in the agent's memory, which is limited. A job has buffers of 16 KiB.
    pub(crate) terminals: usize,
    /// Ended sessions that are still kept. Beyond this number, the oldest are removed early.
    pub(crate) finished_sessions: usize,
    /// Watches at once.
    pub(crate) watches: usize,
    /// Pipes of ended commands that are read at once, so that background processes can keep
    /// writing.
    pub(crate) discarded_pipes: usize,
    /// File operations at once: each has a thread.
    pub(crate) file_operations: usize,
    /// Milliseconds that a file operation may wait for its turn.
    pub(crate) file_wait_ms: u64,
    /// Bytes of output that a job keeps, unless it asks for another number.
    pub(crate) job_output_bytes: u64,
    /// The largest file that can be written, in bytes.
    pub(crate) file_bytes: u64,
    /// Milliseconds that a connection may take to send its request.
    pub(crate) request_ms: u64,
    /// Milliseconds that a write may go without a byte. The program that produces the content may
    /// pause for a long time.
    pub(crate) write_ms: u64,
    /// Milliseconds for which a terminal session is kept after its end.
    pub(crate) finished_session_ms: u64,
    /// Milliseconds for which a job is kept after its end.
    pub(crate) finished_job_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 2048,
            sessions: 512,
            terminals: 128,
            finished_sessions: 64,
            watches: 64,
            discarded_pipes: 1024,
            file_operations: 64,
            file_wait_ms: 10_000,
            job_output_bytes: 64 << 20,
            file_bytes: 64 << 30,
            request_ms: 30_000,
            write_ms: 3_600_000,
            finished_session_ms: 30_000,
            finished_job_ms: 24 * 3600 * 1000,
        }
    }
}

impl Limits {
    /// See [`write_ms`](Self::write_ms).
    pub(crate) const fn write(&self) -> Duration {
        Duration::from_millis(self.write_ms)
    }

    /// See [`request_ms`](Self::request_ms).
    pub(crate) const fn request(&self) -> Duration {
        Duration::from_millis(self.request_ms)
    }
}
