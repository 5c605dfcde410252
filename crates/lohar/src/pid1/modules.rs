//! Kernel modules: loads those that the boot needs, and provides those that are loaded later.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, mount_remount, move_mount, open_tree,
};
use rustix::system::finit_module;

use crate::{log, modprobe};

/// The modules for the boot in the initramfs, named in the order of loading.
const BOOT_MODULES: &str = "/modules";
/// The modules in the initramfs that are loaded later.
const LOADABLE_MODULES: &str = "/loadable-modules";

/// Where programs look for `modprobe`.
const USUAL_PLACES: [&str; 3] = ["/usr/sbin/modprobe", "/sbin/modprobe", "/usr/bin/modprobe"];

/// Loads every module for the boot, and frees the memory of its file.
pub(super) fn load() -> io::Result<()> {
    let mut files: Vec<PathBuf> = fs::read_dir(BOOT_MODULES)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    files.sort();
    for file in files {
        let module = open(&file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        match finit_module(&module, c"", 0) {
            // Built into this kernel.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => log::line(format_args!("failed to load {}: {error}", file.display())),
        }
        fs::remove_file(&file)?;
    }
    Ok(())
}

/// Returns a mount of the modules that are loaded later, for use after the initramfs is out of
/// reach. Returns `None` if the initramfs has none.
pub(super) fn keep_loadable() -> io::Result<Option<OwnedFd>> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match open_tree(CWD, LOADABLE_MODULES, flags) {
        Ok(mount) => Ok(Some(mount)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Mounts these modules in the guest, and configures the kernel to load them on demand.
pub(super) fn offer(loadable: &OwnedFd) -> io::Result<()> {
    fs::create_dir_all(modprobe::MODULES)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(loadable, "", CWD, modprobe::MODULES, flags)?;
    mount_remount(modprobe::MODULES, MountFlags::BIND | MountFlags::RDONLY, c"")?;
    symlink("/proc/1/exe", modprobe::PATH)?;
    fs::write("/proc/sys/kernel/modprobe", modprobe::PATH)?;
    // Programs that load modules themselves need a `modprobe`. An image with its own keeps it.
    let has_one = USUAL_PLACES.iter().any(|place| fs::symlink_metadata(place).is_ok());
    if !has_one && Path::new("/usr/sbin").is_dir() {
        symlink(modprobe::PATH, USUAL_PLACES[0])?;
    }
    Ok(())
}
