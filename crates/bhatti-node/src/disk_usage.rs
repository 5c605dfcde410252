//! The disk space of this host that sandboxes and snapshots take.
//!
//! It is measured: the blocks of all files in their directories, each file once, without the files
//! that images, base snapshots and volumes have as well.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bhatti_types::{SandboxId, SnapshotId};
use tokio::task::spawn_blocking;
use tracing::warn;

use crate::Node;

impl Node {
    /// Returns the bytes that the files of sandboxes and named snapshots take on this host;
    /// [`u64::MAX`] if they could not be measured.
    pub async fn disk_used(&self, sandboxes: &[SandboxId], snapshots: &[SnapshotId]) -> u64 {
        let shared = &self.shared;
        let sandboxes = sandboxes.iter().map(|id| shared.directory(*id));
        let snapshots = snapshots.iter().map(|id| shared.snapshots.of(*id));
        let counted: Vec<PathBuf> = sandboxes.chain(snapshots).collect();
        // Volumes have a quota of their own. Firecracker's VMs have links to theirs.
        let config = &shared.config;
        let images = config.images.directory().to_owned();
        let others = [images, config.bases_dir.clone(), config.volumes_dir.clone()];
        spawn_blocking(move || used_bytes(&counted, &others)).await.unwrap_or(u64::MAX)
    }
}

/// Returns the bytes of the files in `counted`, each file once, without the files that are in one
/// of `others` as well. Blocks on disk.
fn used_bytes(counted: &[PathBuf], others: &[PathBuf]) -> u64 {
    let mut seen = HashSet::new();
    for directory in others {
        add_files(directory, &mut seen);
    }
    counted.iter().map(|directory| add_files(directory, &mut seen)).sum()
}

/// Adds the files below a directory. Returns the bytes of the files that were not in `seen`. A file
/// that is removed meanwhile counts as nothing.
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
    fn file_is_counted_once_and_shared_files_are_not_counted() {
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
