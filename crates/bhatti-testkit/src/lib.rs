//! Real daemons and VMs for tests.
//!
//! `scripts/test.sh` builds the programs and the images first; tests find them through [`dist`] and [`images`]. Each test has a
//! daemon of its own on a data directory of its own, which shares the images with all others. What a test leaves behind goes with its
//! [`TestDaemon`].

pub mod conformance;
mod daemon;
mod engine;
mod faults;
mod files;
mod http;
mod network;
mod sandbox;
mod simulated;
mod skip;
mod stand_in;
mod store;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{sleep, timeout};

pub use daemon::{Serve, TestDaemon, kill_process, kill_vmm, vmm_pid, vmm_pid_of};
pub use engine::{Feature, engine, engine_has, needs};
pub use faults::FailingCalls;
pub use files::{SmallDisk, check_disk, hashes, replace};
pub use http::{Answer, Api, Socket, json_message, message};
pub use network::enter_own_network;
pub use sandbox::{Ran, code_of, collect, named, run, shell, start};
pub use simulated::{Found, FoundVms};
pub use skip::skip;
pub use stand_in::EndlessLister;
pub use store::change_store;

/// How long anything that a test waits for may take.
pub const LIMIT: Duration = Duration::from_secs(240);

/// What a process has in memory, in MiB.
///
/// # Panics
///
/// Panics if there is no such process.
#[must_use]
pub fn resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.expect("its memory is counted") / 1024
}

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A program that `make build` made: `bhatti` or `lohar`.
///
/// # Panics
///
/// Panics if it is not there: a test that ran nothing would say nothing.
#[must_use]
pub fn dist(program: &str) -> PathBuf {
    let path = repository().join("dist").join(program);
    assert!(path.exists(), "`dist/{program}` is not there: run `make build` first");
    path.canonicalize().expect("a file that exists has a path")
}

/// The images that `scripts/test.sh` set up.
///
/// # Panics
///
/// Panics if they are not there.
#[must_use]
pub fn images() -> PathBuf {
    let path = repository().join("target/test-data/images");
    assert!(
        path.join("index.json").exists(),
        "no images for tests are there: run `make test-data` first"
    );
    path.canonicalize().expect("a directory that exists has a path")
}

/// The templates that all tests' daemons share.
///
/// # Panics
///
/// Panics if there is no place for them.
#[must_use]
pub fn templates() -> PathBuf {
    let path = repository().join("target/test-data/templates");
    std::fs::create_dir_all(&path).expect("a directory can be made");
    path.canonicalize().expect("a directory that exists has a path")
}

/// Waits until `condition` holds.
///
/// # Panics
///
/// Panics if it does not within [`LIMIT`].
pub async fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let holds = async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, holds)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come true within {LIMIT:?}"));
}

/// Whether this test may do what only root may.
#[must_use]
pub fn is_root() -> bool {
    std::fs::metadata("/proc/self")
        .is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0)
}
