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
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::{Vm, VmmError};
use bhatti_vmm::{Record, Running};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tracing::info;

use crate::command_line::ROOT_DRIVE;
use crate::{Qemu, overlay};

/// Number of layers from which they are merged. If a merge fails, there is room for as many more.
const MERGE_AT: usize = overlay::LAYERS_MAX / 2;
/// Layers are also merged if that frees more than this fraction of the image's size.
const MERGE_AT_PART: u64 = 4;

/// How long a job may make no progress while it copies, and while it ends.
const STALL_LIMIT: Duration = Duration::from_secs(20);
const END_LIMIT: Duration = Duration::from_secs(10);
/// How often to ask for a job's progress: often at first, because most jobs take a moment.
const LOOKS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));

/// Job states: everything is copied; the job has ended, successfully or not.
const COPIED: &str = "pending";
const CONCLUDED: &str = "concluded";

/// See [`bhatti_engine::Vm::merge_disk`].
pub(crate) async fn merge_disk(vm: &Running<Qemu>, to_save_space: bool) -> Result<bool, VmmError> {
    settle_jobs(vm).await?;
    let record = Arc::clone(&vm.record);
    let Some(plan) = on_thread(move || Plan::of(&record, to_save_space)).await? else {
        return Ok(false);
    };
    let began = Instant::now();
    let Plan { top, base, layers } = plan;
    let arguments = json!({
        "job-id": top, "device": ROOT_DRIVE, "base": vm.directory().join(&base),
        "backing-file": base, "auto-finalize": false, "auto-dismiss": false,
    });
    vm.control.ask("block-stream", arguments).await?;
    let merged = finish(vm, &top).await;
    // End the job in any case: a disk must not be used for anything else while it is being
    // copied.
    settle_jobs(vm).await?;
    merged?;
    let (directory, kept) = (vm.directory().to_owned(), top);
    on_thread(move || remove_other_layers(&directory, &kept)).await?;
    info!(layers, merge_ms = began.elapsed().as_millis(), "Merged the layers of a disk");
    Ok(true)
}

/// A merge that is worthwhile.
struct Plan {
    /// The topmost layer, which gets the content.
    top: String,
    /// The image, which stays.
    base: String,
    /// The number of all layers.
    layers: usize,
}

impl Plan {
    fn of(record: &Record, to_save_space: bool) -> io::Result<Option<Self>> {
        let (directory, top) = (record.directory(), record.machine().disk);
        let mut layers = overlay::chain(directory, &top)?;
        let (count, base) = (layers.len(), layers.pop().unwrap_or_default());
        let frozen = Frozen::of(directory, layers.get(1..).unwrap_or_default())?;
        let image_bytes = overlay::disk_bytes(&directory.join(&base))?;
        let disk_bytes = overlay::disk_bytes(&directory.join(&top))?;
        let least_bytes = if to_save_space { 0 } else { image_bytes / MERGE_AT_PART };
        let is_worthwhile = count >= MERGE_AT || frozen.freed_bytes(disk_bytes) > least_bytes;
        Ok(is_worthwhile.then_some(Self { top, base, layers: count }))
    }
}

/// Disk space of the layers between the topmost one and the image on the host, in bytes.
struct Frozen {
    /// Layers that only this VM uses: merging frees their blocks.
    own: u64,
    /// Layers that snapshots or forks use, too.
    shared: u64,
}

impl Frozen {
    fn of(directory: &Path, layers: &[String]) -> io::Result<Self> {
        let mut frozen = Self { own: 0, shared: 0 };
        for layer in layers {
            let file = fs::metadata(directory.join(layer))?;
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
async fn finish(vm: &Running<Qemu>, job: &str) -> Result<(), VmmError> {
    check(&wait_for(vm, job, COPIED, STALL_LIMIT).await?, COPIED)?;
    let was_running = vm.is_running().await?;
    let finalized = async {
        // Pausing also flushes all disks: the header must not name the image before the copied
        // blocks are on the disk.
        vm.pause().await?;
        vm.control.ask("job-finalize", json!({ "id": job })).await?;
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
pub(crate) async fn settle_jobs(vm: &Running<Qemu>) -> Result<(), VmmError> {
    for job in jobs(vm).await? {
        let Some(id) = job["id"].as_str() else { return Err(VmmError::Garbled) };
        if job["status"] != CONCLUDED {
            vm.control.ask("job-cancel", json!({ "id": id })).await?;
            wait_for(vm, id, CONCLUDED, END_LIMIT).await?;
        }
        sync_top(vm).await?;
        vm.control.ask("job-dismiss", json!({ "id": id })).await?;
    }
    Ok(())
}

async fn jobs(vm: &Running<Qemu>) -> Result<Vec<Value>, VmmError> {
    match vm.control.ask("query-jobs", json!({})).await? {
        Value::Array(jobs) => Ok(jobs),
        _ => Err(VmmError::Garbled),
    }
}

/// Waits until a job is in `state`, or has ended, for as long as it makes progress. Returns QEMU's
/// description of the job.
async fn wait_for(
    vm: &Running<Qemu>,
    id: &str,
    state: &str,
    stall_limit: Duration,
) -> Result<Value, VmmError> {
    let mut progress = Progress::from(Instant::now(), stall_limit);
    loop {
        let mut jobs = jobs(vm).await?;
        let job = jobs.iter_mut().find(|job| job["id"] == id).ok_or(VmmError::Garbled)?;
        if job["status"] == state || job["status"] == CONCLUDED {
            return Ok(job.take());
        }
        let pause = progress.note(job["current-progress"].as_u64(), Instant::now())?;
        sleep(pause).await;
    }
}

/// The progress of a job.
struct Progress {
    began: Instant,
    /// How long the job may make no progress.
    limit: Duration,
    copied: Option<u64>,
    /// When `copied` grew.
    grew: Instant,
}

impl Progress {
    const fn from(now: Instant, limit: Duration) -> Self {
        Self { began: now, limit, copied: None, grew: now }
    }

    /// Notes the progress, in bytes. Returns how long to wait before the next look.
    ///
    /// # Errors
    ///
    /// Returns [`VmmError::Silent`] if there was no progress for the limit.
    fn note(&mut self, copied: Option<u64>, now: Instant) -> Result<Duration, VmmError> {
        if copied != self.copied {
            (self.copied, self.grew) = (copied, now);
        } else if now - self.grew > self.limit {
            return Err(VmmError::Silent { limit: self.limit });
        }
        let (often, seldom) = LOOKS;
        Ok(if now - self.began < Duration::from_secs(1) { often } else { seldom })
    }
}

/// Returns an error if a job failed, or ended before the state `wanted`.
fn check(job: &Value, wanted: &str) -> Result<(), VmmError> {
    if let Some(error) = job["error"].as_str() {
        return Err(VmmError::Refused(error.to_owned()));
    }
    let is_it = job["status"] == wanted;
    is_it.then_some(()).ok_or_else(|| VmmError::Refused("the copy job was canceled".to_owned()))
}

async fn sync_top(vm: &Running<Qemu>) -> Result<(), VmmError> {
    let top = vm.directory().join(&vm.record.machine().disk);
    on_thread(move || File::open(top)?.sync_all()).await
}

/// Removes the links to layers that are not in the chain of the disk `top`, as the layers' headers
/// on the disk give it.
fn remove_other_layers(directory: &Path, top: &str) -> io::Result<()> {
    let kept: HashSet<PathBuf> =
        overlay::chain(directory, top)?.into_iter().map(|layer| directory.join(layer)).collect();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if overlay::is_qcow2(&path) && !kept.contains(&path) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, VmmError> {
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

    #[test]
    fn job_is_given_up_only_without_progress() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut progress = Progress::from(began, STALL_LIMIT);
        // Far longer than the limit, a little at a time.
        for second in 0..600 {
            progress.note(Some(second / 19), at(second)).unwrap();
        }
        progress.note(Some(31), at(608)).unwrap();
        let stalled = progress.note(Some(31), at(700)).unwrap_err();
        assert!(matches!(stalled, VmmError::Silent { .. }), "{stalled}");
    }
}
