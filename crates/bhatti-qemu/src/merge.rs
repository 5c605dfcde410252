//! Merges the layers of a disk. Each snapshot with frozen disks adds a layer. QEMU keeps all
//! layers open, so a disk may have at most [`overlay::LAYERS_MAX`]. A frozen layer also keeps its
//! blocks after newer layers have replaced their content and the snapshot is deleted.
//!
//! QEMU copies the content of the layers in between into the topmost one (`block-stream`), whose
//! backing file is then the image:
//!
//! ```text
//!  copied ─► vCPUs stopped, all flushed ─► header names the image ─► synced ─► job dismissed
//!    ─► links to the layers in between removed
//! ```
//!
//! Until its header names the image, the topmost layer stays valid: the copied blocks equal those
//! of the layers below it. After that, the topmost layer contains everything it needs, on the
//! disk.

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

/// Number of layers from which they are merged. If a merge fails, there is room for as many more.
const MERGE_AT: usize = overlay::LAYERS_MAX / 2;
/// Layers are also merged if that frees more than this fraction of the image's size.
const MERGE_AT_PART: u64 = 4;

/// How long copying may take: other operations on the VM's disk wait for it. Blocks that were
/// copied before the limit stay copied.
const COPY_LIMIT: Duration = Duration::from_secs(20);
/// How long QEMU may take to end a job that is complete or canceled.
const END_LIMIT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);

/// Job states: everything is copied; the job has ended, successfully or not.
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
    // End the job in any case: a disk must not be used for anything else while it is being
    // copied.
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

/// Disk space of the layers between the topmost one and the image on the host, in bytes.
struct Frozen {
    /// Layers that only this VM uses: merging frees their blocks.
    own: u64,
    /// Layers that snapshots or forks use, too.
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

    /// Returns the expected number of bytes that merging frees. Merging copies all content that
    /// newer layers have not replaced into the topmost layer. Copies of the VM's own layers never
    /// take more space than merging frees; shared layers free nothing, so their copies only take
    /// space. A large shared part therefore counts against merging as if none of its content had
    /// been replaced; own and shared copies together are at most the disk's size. A base
    /// snapshot's layer is shared and small.
    fn freed_bytes(&self, disk_bytes: u64) -> u64 {
        if self.shared <= self.own / 8 {
            return self.own - self.shared;
        }
        self.own.saturating_sub((self.own + self.shared).min(disk_bytes))
    }
}

/// Waits until everything is copied, and makes the image the topmost layer's backing file.
async fn finish(vm: &QemuVm, job: &str) -> Result<(), VmmError> {
    check(&wait_for(vm, job, COPIED, COPY_LIMIT).await?, COPIED)?;
    let was_running = vm.is_running().await?;
    let finalized = async {
        // Pausing also flushes all disks: the header must not name the image before the copied
        // blocks are on the disk.
        vm.pause().await?;
        vm.ask("job-finalize", json!({ "id": job })).await?;
        check(&wait_for(vm, job, CONCLUDED, END_LIMIT).await?, CONCLUDED)?;
        sync_top(vm).await
    };
    let finalized = finalized.await;
    // Resume after an error, too: a VM that did not answer in time may have been paused.
    if was_running {
        vm.resume().await?;
    }
    finalized
}

/// Ends QEMU's jobs on the disk, if any: an earlier daemon may have started one. A disk must not
/// be saved while it is being copied: QEMU would make the disk inactive, and the job would
/// continue as if it copied.
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

/// Waits until a job is in `state`, or has ended. Returns QEMU's description of the job.
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

/// Returns an error if a job failed, or ended before the state `wanted`.
fn check(job: &Value, wanted: &str) -> Result<(), VmmError> {
    if let Some(error) = job["error"].as_str() {
        return Err(VmmError::Refused(error.to_owned()));
    }
    let is_it = job["status"] == wanted;
    is_it.then_some(()).ok_or_else(|| VmmError::Refused("the copy job was canceled".to_owned()))
}

async fn sync_top(vm: &QemuVm) -> Result<(), VmmError> {
    let top = vm.directory.join(&vm.machine.lock().disk);
    blocking(move || File::open(top)?.sync_all()).await
}

/// Removes the links to layers that are not in the disk's chain, as the layers' headers on the
/// disk give it.
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
    fn shared_layers_count_against_merging() {
        const GIB: u64 = 1 << 30;
        let freed = |own, shared| Frozen { own, shared }.freed_bytes(4 * GIB);
        assert_eq!(freed(2 * GIB, 0), 2 * GIB);
        assert_eq!(freed(2 * GIB, 1 << 20), 2 * GIB - (1 << 20));
        assert_eq!(freed(2 * GIB, GIB), 0);
        assert_eq!(freed(6 * GIB, 2 * GIB), 2 * GIB);
        assert_eq!(freed(0, GIB), 0);
    }
}
