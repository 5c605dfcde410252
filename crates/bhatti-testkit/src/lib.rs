//! Real daemons and VMs for tests.
//!
//! `scripts/test.sh` builds the programs and the images first; tests find them through [`dist`] and
//! [`images`]. Each test has its own daemon on its own data directory, which shares the images with
//! all others unless the test makes images ([`own_images`]). Dropping a [`TestDaemon`] removes
//! everything that its test has left.

pub mod conformance;
mod daemon;
mod engine;
mod faults;
mod files;
mod http;
mod network;
pub mod registry;
mod sandbox;
mod simulated;
mod skip;
mod stand_in;
mod store;
mod tool;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::{sleep, timeout};

pub use daemon::{Fault, Serve, TestDaemon, kill_process, kill_vmm, vmm_pid, vmm_pid_of};
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

/// Limit of every wait in a test.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Returns the resident memory of a process, in MiB.
///
/// # Panics
///
/// Panics if there is no such process.
#[must_use]
pub fn resident_mib(pid: u32) -> u64 {
    status_mib(pid, "VmRSS:")
}

/// Returns the most memory that a process has had resident since [`reset_peak`], in MiB.
///
/// # Panics
///
/// Panics if there is no such process.
#[must_use]
pub fn peak_resident_mib(pid: u32) -> u64 {
    status_mib(pid, "VmHWM:")
}

/// Sets the peak of a process's resident memory to what it has now.
///
/// # Panics
///
/// Panics if there is no such process, or if it belongs to another user.
pub fn reset_peak(pid: u32) {
    // Source: proc_pid_clear_refs(5).
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("the process is ours");
}

fn status_mib(pid: u32, field: &str) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process exists");
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.expect("the status has the field") / 1024
}

/// Returns the root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Returns the path of a program that `make build` has built: `bhatti` or `lohar`.
///
/// # Panics
///
/// Panics if the program does not exist. A test that skipped itself instead would prove nothing.
#[must_use]
pub fn dist(program: &str) -> PathBuf {
    let path = repository().join("dist").join(program);
    assert!(path.exists(), "`dist/{program}` does not exist: run `make build` first");
    path.canonicalize().expect("a file that exists has a path")
}

/// Returns the directory of images that `make test-data` has built.
///
/// # Panics
///
/// Panics if the images do not exist.
#[must_use]
pub fn images() -> PathBuf {
    let path = repository().join("target/test-data/images");
    assert!(
        path.join("index.json").exists(),
        "the images for tests do not exist: run `make test-data` first"
    );
    path.canonicalize().expect("a directory that exists has a path")
}

/// Makes a directory whose `images` is a copy of [`images`], for a test that makes images of its
/// own. The files are links: what changes a file there replaces it.
///
/// # Panics
///
/// Panics if the copy cannot be made.
pub async fn own_images() -> TempDir {
    copy_of(images()).await
}

/// Makes a directory whose `images` is a copy of the images for builds, like [`own_images`].
///
/// # Panics
///
/// Panics if the copy cannot be made.
pub async fn builder_images() -> TempDir {
    copy_of(repository().join("target/test-data-builder/images")).await
}

async fn copy_of(images: PathBuf) -> TempDir {
    let place = tempfile::tempdir_in(repository().join("target")).expect("a directory can be made");
    let copy = place.path().join("images");
    let copied =
        bhatti_host::process::command("cp").args(["-a", "--link"]).arg(images).arg(&copy).status();
    assert!(copied.await.expect("`cp` runs").success());
    // Two directories must not share a lock.
    for lock in [".lock", ".layers.lock"] {
        let _is_missing = std::fs::remove_file(copy.join(lock));
    }
    place
}

/// Returns the directory of base snapshots that the daemons of all tests share.
///
/// # Panics
///
/// Panics if the directory cannot be created.
#[must_use]
pub fn templates() -> PathBuf {
    let path = repository().join("target/test-data/templates");
    std::fs::create_dir_all(&path).expect("a directory can be made");
    path.canonicalize().expect("a directory that exists has a path")
}

/// Waits until `condition` holds. `what` names the condition in the panic message.
///
/// # Panics
///
/// Panics if the condition does not hold within [`LIMIT`].
pub async fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let holds = async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, holds)
        .await
        .unwrap_or_else(|_| panic!("timed out after {LIMIT:?}; waited for: {what}"));
}

/// Whether this test runs as root.
#[must_use]
pub fn is_root() -> bool {
    std::fs::metadata("/proc/self")
        .is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0)
}
