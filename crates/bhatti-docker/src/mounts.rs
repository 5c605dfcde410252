//! Volumes: the engine mounts their file systems on this host and binds the mounts into the
//! container.
//!
//! Removing the sandbox's directory must not delete a volume's content, so the engine removes a
//! mount point only when nothing is mounted there any more.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bhatti_engine::{RemoveError, VolumeFile};
use bhatti_host::blocking;
use bhatti_host::process::command;
use bhatti_vmm::create_private;
use rustix::fs::{StatVfsMountFlags, Timespec, major, minor, stat, statvfs};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::thread::nanosleep;
use tokio::time::{Instant, timeout};

const DIRECTORY: &str = "mounts";

/// The major number of loop devices: Documentation/admin-guide/devices.txt.
const LOOP_MAJOR: u32 = 7;

/// How long an unmounted volume may stay open, and the pause between checks.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
const CLOSE_LOOK_NS: i64 = 1_000_000;

/// How long a mount may take: a file system may ask its mounter to wait for other hosts (MMP).
const MOUNT_LIMIT: Duration = Duration::from_secs(60);

/// The mount of a volume.
#[derive(Clone, Debug)]
pub(crate) struct Mounted {
    /// The mount point on this host.
    pub(crate) here: PathBuf,
    /// The mount point in the container.
    pub(crate) there: String,
    pub(crate) read_only: bool,
}

/// Returns the mounts that the volumes of a sandbox have.
pub(crate) fn places(directory: &Path, volumes: &[Option<VolumeFile>]) -> Vec<Mounted> {
    let place = |(number, volume): (usize, &Option<VolumeFile>)| {
        let volume = volume.as_ref()?;
        Some(Mounted {
            here: directory.join(DIRECTORY).join(number.to_string()),
            there: volume.mount.clone(),
            read_only: volume.read_only,
        })
    };
    volumes.iter().enumerate().filter_map(place).collect()
}

/// Mounts the volumes of a sandbox.
pub(crate) async fn make(directory: &Path, volumes: &[Option<VolumeFile>]) -> io::Result<()> {
    let files = volumes.iter().flatten().map(|volume| &volume.path);
    for (file, place) in files.zip(places(directory, volumes)) {
        blocking(|| create_private(&place.here))?;
        let access = if place.read_only { "ro" } else { "rw" };
        // Sets the behavior on errors, because the superblock could ask for a kernel panic.
        let options = format!("loop,nosuid,nodev,noatime,errors=remount-ro,{access}");
        let mut mount = command("mount");
        mount.args(["-t", "ext4", "-o", &options]).args([file, &place.here]);
        let output = timeout(MOUNT_LIMIT, mount.output()).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, "the mount of a volume timed out")
        })??;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(io::Error::other(message));
        }
    }
    Ok(())
}

/// Unmounts the volumes of a sandbox, which writes their cached data, and removes the mount points.
pub(crate) async fn remove(directory: &Path) -> Result<(), RemoveError> {
    let directory = directory.join(DIRECTORY);
    let at = directory.clone();
    let removed = tokio::task::spawn_blocking(move || remove_all(&directory)).await;
    removed
        .map_err(io::Error::other)
        .and_then(|removed| removed)
        .map_err(|source| RemoveError::Files { path: at, source })
}

/// Returns the number of the loop device of a volume that is mounted read-write at `place`.
fn written_device(directory: &Path, place: &Path) -> io::Result<Option<u32>> {
    let device = stat(place)?.st_dev;
    // The sandbox's directory itself may lie on a loop device.
    let is_mounted = device != stat(directory)?.st_dev && major(device) == LOOP_MAJOR;
    let is_written = !statvfs(place)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    Ok((is_mounted && is_written).then(|| minor(device)))
}

/// Waits until the kernel has released a volume's loop device. The kernel unmounts a dead
/// container's mounts with a delay. Until then it may still write the volume's file, and e2fsck
/// must not run on it.
fn wait_until_closed(device: u32) -> io::Result<()> {
    let backing = format!("/sys/block/loop{device}/loop/backing_file");
    let began = Instant::now();
    while Path::new(&backing).exists() {
        if began.elapsed() > CLOSE_LIMIT {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "a volume is still in use"));
        }
        let pause = Timespec { tv_sec: 0, tv_nsec: CLOSE_LOOK_NS };
        // If a signal interrupts the pause, the next check is only early.
        drop(nanosleep(&pause));
    }
    Ok(())
}

fn remove_all(directory: &Path) -> io::Result<()> {
    let places = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        places => places?,
    };
    for place in places {
        let place = place?.path();
        let device = written_device(directory, &place)?;
        loop {
            match unmount(&place, UnmountFlags::NOFOLLOW) {
                Ok(()) => {}
                // Nothing is mounted there.
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(device) = device {
            wait_until_closed(device)?;
        }
        fs::remove_dir(place)?;
    }
    fs::remove_dir(directory)
}
