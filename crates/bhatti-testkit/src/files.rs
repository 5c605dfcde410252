//! Helpers for disks and files.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use bhatti_host::disk::free_bytes;
use bhatti_host::process::command;

/// A tmpfs of limited size, mounted until this value is dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts a tmpfs of `size` at `directory`. Needs root.
    ///
    /// # Panics
    ///
    /// Panics if the mount fails.
    pub async fn mount(directory: &Path, size: &str) -> Self {
        let options = format!("size={size},mode=0700");
        let mut mount = command("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(directory);
        assert!(mount.status().await.is_ok_and(|status| status.success()), "the mount failed");
        Self(directory.to_owned())
    }

    /// Creates `file` on the disk, so large that only `left` bytes stay free.
    ///
    /// # Panics
    ///
    /// Panics if fewer bytes are free.
    pub async fn fill(&self, file: &Path, left: u64) {
        let free = free_bytes(&self.0).expect("the free space can be read");
        let bytes = free.checked_sub(left).expect("enough bytes are free").to_string();
        let made = command("fallocate").args(["--length", &bytes]).arg(file).status().await;
        assert!(made.is_ok_and(|status| status.success()), "the disk could not be filled");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a VMM that a failed test has left may still have open files there.
        crate::tool::std_command("umount", &["-l", &self.0.to_string_lossy()]);
    }
}

/// Returns the names of a snapshot's files and hashes of their content, sorted by name, without the
/// image, which is large.
///
/// # Panics
///
/// Panics if a file cannot be read.
#[must_use]
pub fn hashes(directory: &Path) -> Vec<(String, u64)> {
    let entries = fs::read_dir(directory).expect("the directory can be read").flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.ends_with(".ext4"));
    names.sort();
    let hash = |name: String| {
        let mut hasher = DefaultHasher::new();
        fs::read(directory.join(&name)).expect("the file can be read").hash(&mut hasher);
        (name, hasher.finish())
    };
    names.into_iter().map(hash).collect()
}

/// Checks a copy of the root file system of a saved sandbox.
///
/// # Panics
///
/// Panics if the file system is damaged.
pub async fn check_disk(sandbox: &Path) {
    let manifest = fs::read(sandbox.join("snapshot/manifest.json")).expect("the sandbox is saved");
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("a manifest");
    // An engine whose manifest names no disk has one disk file.
    let disk = manifest["machine"]["disk"].as_str().unwrap_or("disk.ext4");
    let copy = sandbox.join("copy.raw");
    let mut convert = command("qemu-img");
    convert.args(["convert", "-O", "raw"]).arg(sandbox.join(disk)).arg(&copy);
    assert!(convert.status().await.is_ok_and(|status| status.success()), "the copy failed");
    let checked = command("e2fsck").arg("-fp").arg(&copy).output().await.expect("e2fsck runs");
    // The file system was mounted, so e2fsck replays the journal and updates the counters (exit
    // code 1). With `-p`, it stops at any other damage (exit code 4).
    let text = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{text}");
    fs::remove_file(copy).expect("the copy can be removed");
}

/// Replaces a file with a new one. The old file may be read-only.
///
/// # Panics
///
/// Panics if the file does not exist, or the new one cannot be written.
pub fn replace(path: &Path, content: impl AsRef<[u8]>) {
    fs::remove_file(path).expect("the file is there");
    fs::write(path, content).expect("the new file can be written");
}
