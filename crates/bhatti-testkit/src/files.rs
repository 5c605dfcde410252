//! What tests do with files.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use bhatti_host::disk::free_bytes;
use bhatti_host::process::command;

/// A file system of a few MiB, mounted until it is dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one. Needs root.
    ///
    /// # Panics
    ///
    /// Panics if it cannot be mounted.
    pub async fn mount(directory: &Path, size: &str) -> Self {
        let options = format!("size={size},mode=0700");
        let mut mount = command("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(directory);
        assert!(mount.status().await.is_ok_and(|status| status.success()), "it can be mounted");
        Self(directory.to_owned())
    }

    /// Makes `file` on it, so large that only so many bytes are left.
    ///
    /// # Panics
    ///
    /// Panics if there are less.
    pub async fn fill(&self, file: &Path, left: u64) {
        let free = free_bytes(&self.0).expect("it says what is free");
        let bytes = free.checked_sub(left).expect("there is that much").to_string();
        let made = command("fallocate").args(["--length", &bytes]).arg(file).status().await;
        assert!(made.is_ok_and(|status| status.success()), "it can be filled");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a VMM that a failed test left behind may still have files there.
        crate::daemon::std_command("umount", &["-l", &self.0.to_string_lossy()]);
    }
}

/// The files of a snapshot with a hash of their bytes, but for the image, which is large.
///
/// # Panics
///
/// Panics if they cannot be read.
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

/// Checks the root file system of a sandbox that sleeps, in a copy.
///
/// # Panics
///
/// Panics if it is damaged.
pub async fn check_disk(sandbox: &Path) {
    let manifest = fs::read(sandbox.join("snapshot/manifest.json")).expect("it sleeps");
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("a manifest");
    // Where a machine does not name its disk, it has one file.
    let disk = manifest["machine"]["disk"].as_str().unwrap_or("disk.ext4");
    let copy = sandbox.join("copy.raw");
    let mut convert = command("qemu-img");
    convert.args(["convert", "-O", "raw"]).arg(sandbox.join(disk)).arg(&copy);
    assert!(convert.status().await.is_ok_and(|status| status.success()), "it can be copied");
    let checked = command("e2fsck").arg("-fp").arg(&copy).output().await.expect("e2fsck runs");
    // It was mounted, so the journal is played back and the counters are brought up to date (1); of anything else it says 4 and stops.
    let text = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{text}");
    fs::remove_file(copy).expect("it can be removed");
}

/// Puts other content in the place of a file, which may be one that cannot be written.
///
/// # Panics
///
/// Panics if the file is not there, or no other can be.
pub fn replace(path: &Path, content: impl AsRef<[u8]>) {
    fs::remove_file(path).expect("the file is there");
    fs::write(path, content).expect("another can be there");
}
