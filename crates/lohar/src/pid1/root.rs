//! Switches from the initramfs to the root disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bhatti_proto::{AWAIT_ROOT, AWAITING_ROOT};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};
use rustix::thread::nanosleep;

use super::disk_growth;
use crate::{disk, log};

/// The virtio-blk serial by which the host marks the root disk.
const ROOT_SERIAL: &str = "root";

/// The number of attempts to find the root disk, and the pause between two of them in
/// nanoseconds.
const DISK_LOOKS: u32 = 1000;
const DISK_PAUSE_NS: i64 = 5_000_000;

/// Waits for the root disk and returns its device.
pub(super) fn find_disk() -> io::Result<PathBuf> {
    for _ in 0..DISK_LOOKS {
        if let Some(disk) = disk_with_serial(ROOT_SERIAL)? {
            return Ok(disk);
        }
        let pause = rustix::fs::Timespec { tv_sec: 0, tv_nsec: DISK_PAUSE_NS };
        // An early return only means an early attempt.
        drop(nanosleep(&pause));
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no disk has the serial `{ROOT_SERIAL}`")))
}

/// Waits until the root disk has a file system, if the host has asked for that. The host saves the
/// waiting guest, and restores it later with the disk of an image. A disk whose content and size
/// have changed must be probed again. Returns the disk's device.
pub(super) fn await_file_system(mut disk: PathBuf) -> io::Result<PathBuf> {
    if std::env::var_os(AWAIT_ROOT).is_none() {
        return Ok(disk);
    }
    log::line(format_args!("{AWAITING_ROOT}"));
    while !disk_growth::has_file_system(&disk) {
        let pause = rustix::fs::Timespec { tv_sec: 0, tv_nsec: DISK_PAUSE_NS };
        drop(nanosleep(&pause));
        disk = disk::find(ROOT_SERIAL, true)?;
    }
    Ok(disk)
}

fn disk_with_serial(wanted: &str) -> io::Result<Option<PathBuf>> {
    let block = disk::block_with(wanted)?;
    let device = block.map(|block| Path::new("/dev").join(block.file_name().unwrap_or_default()));
    Ok(device.filter(|device| device.exists()))
}

/// Mounts `disk` and makes it the root, with the early file systems in it.
pub(super) fn switch_to(disk: &Path) -> io::Result<()> {
    const NEW_ROOT: &str = "/root-disk";
    fs::create_dir_all(NEW_ROOT)?;
    // Deleting a file in the guest frees space on the host's disk, too.
    mount(disk, NEW_ROOT, "ext4", MountFlags::NOATIME, c"discard")?;
    for early in ["/dev", "/sys"] {
        let target = format!("{NEW_ROOT}{early}");
        fs::create_dir_all(&target)?;
        mount_move(early, &target)?;
    }
    // An image of one program may have no `/etc`; host name and resolvers are written there.
    fs::create_dir_all(format!("{NEW_ROOT}/etc"))?;
    chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}
