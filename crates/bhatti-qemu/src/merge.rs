//! Merges the layers of a disk. Each snapshot that others may stand on freezes one. QEMU keeps all
//! of them open, so a disk may have only [`overlay::LAYERS_MAX`]; and a frozen layer keeps its
//! blocks when newer layers have replaced their content and the snapshot is deleted.
//!
//! QEMU copies what the layers between hold into the topmost one (`block-stream`), which stands on the image then:
//!
//! ```text
//!  copied ─► vCPUs stopped, all flushed ─► header names the image ─► synced ─► job gone ─► links to the layers between gone
//! ```
//!
//! Until its header names the image, the topmost layer is as good as it was: what was copied is what stands below. After that everything that
//! it needs is in it, and on the disk.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use bhatti_engine::{Vm, VmmError};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tracing::info;

use crate::command_line::ROOT_DRIVE;
use crate::overlay;
use crate::vm::QemuVm;

/// From how many layers on they are merged: one that fails leaves room for as many more.
const MERGE_AT: usize = overlay::LAYERS_MAX / 2;
/// Layers are merged when that frees more than this part of the image's size.
const MERGE_AT_PART: u64 = 4;

/// How long copying may take: who waits for the VM's disk waits for that. What was copied stays so if it takes longer.
const COPY_LIMIT: Duration = Duration::from_secs(20);
/// How long QEMU may take to end a job whose work is done, or not wanted.
const END_LIMIT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);

/// A job's states: all is copied, and it has ended, however that was.
const COPIED: &str = "pending";
const CONCLUDED: &str = "concluded";

/// See [`bhatti_engine::Vm::merge_disk`].
pub(crate) async fn merge_disk(vm: &QemuVm, to_save_space: bool) -> Result<bool, VmmError> {
    settle_jobs(vm).await?;
    let top = vm.machine.lock().disk.clone();
    let layers = overlay::chain(&vm.directory, &top)?;
    let Some((base, frozen)) = layers.split_last() else { return Ok(false) };
    let frozen = Frozen::of(vm, frozen.get(1..).unwrap_or_default())?;
    let image_bytes = overlay::disk_bytes(&vm.directory.join(base))?;
    let disk_bytes = overlay::disk_bytes(&vm.directory.join(&top))?;
    let least_bytes = if to_save_space { 0 } else { image_bytes / MERGE_AT_PART };
    if layers.len() < MERGE_AT && frozen.freed_bytes(disk_bytes) <= least_bytes {
        return Ok(false);
    }
    let began = Instant::now();
    let arguments = json!({
        "job-id": top, "device": ROOT_DRIVE, "base": vm.directory.join(base), "backing-file": base,
        "auto-finalize": false, "auto-dismiss": false,
    });
    vm.ask("block-stream", arguments).await?;
    let merged = finish(vm, &top).await;
    // Whatever came of it, nothing else is done to a disk that is being copied.
    settle_jobs(vm).await?;
    merged?;
    remove_other_layers(vm).await?;
    info!(
        layers = layers.len(),
        merge_ms = began.elapsed().as_millis(),
        "Merged the layers of a disk"
    );
    Ok(true)
}

/// What the layers between the topmost one and the image take of the host's disk, in bytes.
struct Frozen {
    /// Layers that only this VM has: their blocks are free once they are merged.
    own: u64,
    /// Layers that snapshots or forks have, too.
    shared: u64,
}

impl Frozen {
    fn of(vm: &QemuVm, layers: &[String]) -> io::Result<Self> {
        let mut frozen = Self { own: 0, shared: 0 };
        for layer in layers {
            let file = fs::metadata(vm.directory.join(layer))?;
            let bytes = file.blocks() * 512;
            let part = if file.nlink() == 1 { &mut frozen.own } else { &mut frozen.shared };
            *part += bytes;
        }
        Ok(frozen)
    }

    /// What merging is expected to free. The content of every layer that newer ones have not
    /// replaced is copied into the topmost layer: of this VM's own layers never more than they
    /// free, of shared ones all that they have. So a large shared part counts against merging as if
    /// nothing had been replaced; the disk's size is the limit of both. A base snapshot's layer is
    /// shared and small.
    fn freed_bytes(&self, disk_bytes: u64) -> u64 {
        if self.shared <= self.own / 8 {
            return self.own - self.shared;
        }
        self.own.saturating_sub((self.own + self.shared).min(disk_bytes))
    }
}

/// Waits until everything is copied, and has the topmost layer stand on the image.
async fn finish(vm: &QemuVm, job: &str) -> Result<(), VmmError> {
    check(&wait_for(vm, job, COPIED, COPY_LIMIT).await?, COPIED)?;
    let was_running = vm.is_running().await?;
    let finalized = async {
        // Flushes all disks, too: the header must not name the image before what was copied is there.
        vm.pause().await?;
        vm.ask("job-finalize", json!({ "id": job })).await?;
        check(&wait_for(vm, job, CONCLUDED, END_LIMIT).await?, CONCLUDED)?;
        sync_top(vm).await
    };
    let finalized = finalized.await;
    // Whatever came of it: a VM that did not answer may have stopped.
    if was_running {
        vm.resume().await?;
    }
    finalized
}

/// Ends what QEMU does to the disk by itself, if it does: an earlier daemon may have begun it. A disk that is being copied must not be saved:
/// QEMU makes it inactive then, and goes on as if it copied.
pub(crate) async fn settle_jobs(vm: &QemuVm) -> Result<(), VmmError> {
    for job in jobs(vm).await? {
        let Some(id) = job["id"].as_str() else { return Err(VmmError::Garbled) };
        if job["status"] != CONCLUDED {
            vm.ask("job-cancel", json!({ "id": id })).await?;
            wait_for(vm, id, CONCLUDED, END_LIMIT).await?;
        }
        sync_top(vm).await?;
        vm.ask("job-dismiss", json!({ "id": id })).await?;
    }
    Ok(())
}

async fn jobs(vm: &QemuVm) -> Result<Vec<Value>, VmmError> {
    match vm.ask("query-jobs", json!({})).await? {
        Value::Array(jobs) => Ok(jobs),
        _ => Err(VmmError::Garbled),
    }
}

/// Waits until a job is in a state, or has ended. Returns what QEMU says of it then.
async fn wait_for(vm: &QemuVm, id: &str, state: &str, limit: Duration) -> Result<Value, VmmError> {
    let began = Instant::now();
    while began.elapsed() < limit {
        let mut jobs = jobs(vm).await?;
        let job = jobs.iter_mut().find(|job| job["id"] == id).ok_or(VmmError::Garbled)?;
        if job["status"] == state || job["status"] == CONCLUDED {
            return Ok(job.take());
        }
        sleep(LOOK).await;
    }
    Err(VmmError::Silent { limit })
}

/// Whether a job has ended with an error, or too early.
fn check(job: &Value, wanted: &str) -> Result<(), VmmError> {
    if let Some(error) = job["error"].as_str() {
        return Err(VmmError::Refused(error.to_owned()));
    }
    let is_it = job["status"] == wanted;
    is_it.then_some(()).ok_or_else(|| VmmError::Refused("the copying was ended".to_owned()))
}

async fn sync_top(vm: &QemuVm) -> Result<(), VmmError> {
    let top = vm.directory.join(&vm.machine.lock().disk);
    blocking(move || File::open(top)?.sync_all()).await
}

/// Removes the links to layers that the disk does not stand on, by what is on the disk.
async fn remove_other_layers(vm: &QemuVm) -> Result<(), VmmError> {
    let (directory, top) = (vm.directory.clone(), vm.machine.lock().disk.clone());
    blocking(move || {
        let kept: HashSet<PathBuf> = overlay::chain(&directory, &top)?
            .into_iter()
            .map(|layer| directory.join(layer))
            .collect();
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if overlay::is_qcow2(&path) && !kept.contains(&path) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    })
    .await
}

async fn blocking(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<(), VmmError> {
    Ok(spawn_blocking(work).await.map_err(io::Error::other)??)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_others_have_too_speak_against_merging() {
        const GIB: u64 = 1 << 30;
        let freed = |own, shared| Frozen { own, shared }.freed_bytes(4 * GIB);
        assert_eq!(freed(2 * GIB, 0), 2 * GIB);
        assert_eq!(freed(2 * GIB, 1 << 20), 2 * GIB - (1 << 20));
        assert_eq!(freed(2 * GIB, GIB), 0);
        assert_eq!(freed(6 * GIB, 2 * GIB), 2 * GIB);
        assert_eq!(freed(0, GIB), 0);
    }
}
