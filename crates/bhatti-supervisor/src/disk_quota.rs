//! The disk space of the host that a user's sandboxes and snapshots take, and its limit.
//!
//! It is measured: the blocks of all files in the directories of the user's sandboxes and
//! snapshots, each file once, without what the images, base snapshots and volumes have, too. The
//! limit is checked by the operations that add files. What a guest writes to its own disk is
//! bounded by the size of that disk, so a user can exceed the limit by the sizes of its sandboxes'
//! disks at most.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bhatti_store::{SandboxRow, StoreError};
use bhatti_types::{QuotaExceeded, UserId};
use parking_lot::Mutex;
use tokio::task::spawn_blocking;
use tracing::warn;

use crate::Shared;
use crate::driver::Request;

const MIB: u64 = 1 << 20;

/// Bytes that operations under way may still add, by user.
pub(crate) type Reserved = Arc<Mutex<HashMap<UserId, u64>>>;

/// Bytes that are set aside for one operation, until this is dropped.
#[derive(Debug)]
pub(crate) struct DiskReservation {
    reserved: Reserved,
    owner: UserId,
    bytes: u64,
}

impl Drop for DiskReservation {
    fn drop(&mut self) {
        let mut reserved = self.reserved.lock();
        if let Some(bytes) = reserved.get_mut(&self.owner) {
            *bytes -= self.bytes;
            if *bytes == 0 {
                reserved.remove(&self.owner);
            }
        }
    }
}

/// An operation may not take more of the disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskQuotaError {
    /// The user would have more than it may.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Shared {
    /// Admits an operation that saves a sandbox: its memory and copies of its volumes may be added.
    /// If there is no room for them, the layers of the sandbox's disk are merged first.
    ///
    /// # Errors
    ///
    /// If the owner's limit does not allow it. Nothing has changed then but the layers.
    pub(crate) async fn admit_save(
        &self,
        row: &SandboxRow,
    ) -> Result<Option<DiskReservation>, DiskQuotaError> {
        let volumes: u64 = row.volumes.iter().map(|volume| volume.size.bytes()).sum();
        let needed = u64::from(row.spec.memory.get()) * MIB + volumes;
        let refused = match self.admit_disk(row.owner, needed).await {
            Err(DiskQuotaError::Quota(refused)) => refused,
            other => return other,
        };
        let Some(handle) = self.registry.get(row.id) else { return Err(refused.into()) };
        match handle.ask(Request::MergeDisk).await {
            Ok(true) => self.admit_disk(row.owner, needed).await,
            _ => Err(refused.into()),
        }
    }

    /// Admits an operation that may add `needed` bytes.
    ///
    /// # Errors
    ///
    /// If the owner's limit does not allow it.
    pub(crate) async fn admit_disk(
        &self,
        owner: UserId,
        needed: u64,
    ) -> Result<Option<DiskReservation>, DiskQuotaError> {
        let Some(max) = self.store.quota(owner)?.disk_mib else { return Ok(None) };
        let sandboxes = self.store.list_sandbox_ids(owner)?;
        let config = &self.config;
        let counted: Vec<PathBuf> =
            (sandboxes.iter().map(|id| config.sandboxes_dir.join(id.to_string())))
                .chain(
                    self.store
                        .list_snapshots(Some(owner))?
                        .iter()
                        .map(|it| config.snapshots_dir.join(it.id.to_string())),
                )
                .collect();
        // Volumes have a limit of their own; Firecracker's VMs have links to theirs.
        let images = config.images.directory().to_owned();
        let others = [images, config.templates_dir.clone(), config.volumes_dir.clone()];
        // A measurement that did not end admits nothing.
        let used = spawn_blocking(move || used_bytes(&counted, &others)).await.unwrap_or(u64::MAX);
        let mut all = self.disk_reserved.lock();
        let reserved = all.entry(owner).or_default();
        let used = used.saturating_add(*reserved);
        if used.saturating_add(needed) > u64::from(max) * MIB {
            let (used, needed) = (used.div_ceil(MIB), needed.div_ceil(MIB));
            return Err(QuotaExceeded::Disk { used, needed, max }.into());
        }
        *reserved += needed;
        Ok(Some(DiskReservation {
            reserved: Arc::clone(&self.disk_reserved),
            owner,
            bytes: needed,
        }))
    }
}

/// The bytes that the files in these directories take, each file once, without those that lie in
/// one of `others`, too. Blocks on disk.
fn used_bytes(counted: &[PathBuf], others: &[PathBuf]) -> u64 {
    let mut seen = HashSet::new();
    for directory in others {
        add_files(directory, &mut seen);
    }
    counted.iter().map(|directory| add_files(directory, &mut seen)).sum()
}

/// Adds the files below a directory. Returns the bytes of those that were not there. What goes meanwhile takes nothing.
fn add_files(directory: &Path, seen: &mut HashSet<(u64, u64)>) -> u64 {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return 0,
        Err(error) => {
            warn!(path = %directory.display(), %error, "Failed to measure a directory");
            return 0;
        }
    };
    let mut bytes = 0;
    for entry in entries.flatten() {
        let Ok(file) = entry.path().symlink_metadata() else { continue };
        if file.is_dir() {
            bytes += add_files(&entry.path(), seen);
        } else if file.is_file() && seen.insert((file.dev(), file.ino())) {
            bytes += file.blocks() * 512;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_is_counted_once_and_not_if_others_have_it() {
        let data = tempfile::tempdir().unwrap();
        let directory = |name: &str| {
            let path = data.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (images, one, two) = (directory("images"), directory("one"), directory("two"));
        fs::write(images.join("root"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(images.join("root"), one.join("base")).unwrap();
        fs::write(one.join("layer"), vec![1; 2 << 20]).unwrap();
        fs::hard_link(one.join("layer"), two.join("layer")).unwrap();
        fs::create_dir(two.join("inner")).unwrap();
        fs::write(two.join("inner/memory"), vec![1; 1 << 20]).unwrap();

        let used = used_bytes(&[one.clone(), two], std::slice::from_ref(&images));
        assert_eq!(used >> 20, 3);
        assert_eq!(used_bytes(&[one, data.path().join("gone")], &[images]) >> 20, 2);
    }
}
