//! What a VM's QEMU reaches of this host: its own directory, what its disk and memory stand on, its volumes, and what it is told to load.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bhatti_engine::Accelerator;
use bhatti_host::process::{self, Confinement, Reach, User};

use crate::record::Machine;
use crate::{Setup, locate, overlay};

/// What a layer takes beside its content, at most.
const TABLE_BYTES: u64 = 64 << 20;

const KVM: &str = "/dev/kvm";

/// Where a QEMU of somebody's own has its libraries and firmware: beside the directory of programs that it is in, or, as it was built, beside
/// itself.
const INSTALLED: [&str; 6] =
    ["lib", "lib64", "libexec", "share/qemu", "share/seabios", "share/qemu-firmware"];
const BUILT: [&str; 2] = ["pc-bios", "qemu-bundle"];

/// The rules for QEMU with `directory` as its own, which loads `loaded`.
pub(crate) fn confinement(
    setup: &Setup,
    directory: &Path,
    machine: &Machine,
    loaded: &[&Path],
) -> io::Result<Confinement> {
    let (program, elsewhere) = (program(&setup.program), elsewhere(directory, machine));
    let run: Vec<&Path> = program.iter().map(PathBuf::as_path).collect();
    let mut read: Vec<&Path> = elsewhere.iter().map(PathBuf::as_path).collect();
    read.extend(loaded);
    let mut write = vec![directory];
    for volume in machine.volumes.iter().flatten() {
        if volume.read_only { &mut read } else { &mut write }.push(&volume.path);
    }
    if setup.accelerator == Accelerator::Kvm {
        write.push(Path::new(KVM));
    }
    Confinement::new(Reach { run: &run, read: &read, write: &write })
}

/// Gives what QEMU writes to its user, if the daemon is root: without root's rights QEMU cannot
/// write what is another's.
///
/// # Errors
///
/// Returns the error of chown(2).
pub(crate) fn give_to(user: u32, directory: &Path, machine: &Machine) -> io::Result<()> {
    let volumes = machine.volumes.iter().flatten().filter(|volume| !volume.read_only);
    let written = volumes.map(|volume| volume.path.clone()).chain([directory.join(&machine.disk)]);
    written.into_iter().try_for_each(|path| bhatti_vmm::give_to(&path, user))
}

/// The longest file that QEMU writes, in bytes: its disk's layer when it is full, with the tables
/// of qcow2, or a volume.
///
/// # Errors
///
/// Returns the error of reading the disk's layers.
pub(crate) fn file_bytes(directory: &Path, machine: &Machine) -> io::Result<u64> {
    // The image's size: the headers of the layers above it were written by a QEMU.
    let layers = overlay::chain(directory, &machine.disk)?;
    let image = layers.last().map(|layer| fs::metadata(directory.join(layer))).transpose()?;
    let disk = image.map_or(0, |image| image.len());
    let volumes = machine.volumes.iter().flatten();
    let volume =
        volumes.filter_map(|volume| fs::metadata(&volume.path).ok()).map(|file| file.len()).max();
    Ok(disk.saturating_add(disk / 8).saturating_add(TABLE_BYTES).max(volume.unwrap_or_default()))
}

/// The user that QEMU becomes, if it can be another one than the daemon's. It reads what its rules
/// allow, whosever it is: layers and memory are shared.
pub(crate) fn user(setup: &Setup, user: u32) -> Option<User> {
    if !process::can_use_users() {
        return None;
    }
    let group = match setup.accelerator {
        Accelerator::Kvm => group_for_kvm(&fs::metadata(KVM).ok()?)?,
        Accelerator::Tcg => None,
    };
    Some(User { id: user, group, reads_all: true })
}

/// The group that another user needs to open the device; none at all if only its owner can.
fn group_for_kvm(device: &fs::Metadata) -> Option<Option<u32>> {
    const GROUP: u32 = 0o060;
    const OTHERS: u32 = 0o006;
    if device.mode() & OTHERS == OTHERS {
        return Some(None);
    }
    (device.mode() & GROUP == GROUP && device.gid() != 0).then_some(Some(device.gid()))
}

/// The program and what comes with it.
fn program(called: &Path) -> Vec<PathBuf> {
    let Some(program) = locate(called) else { return Vec::new() };
    let Some(place) = program.parent() else { return Vec::new() };
    let beside: Vec<PathBuf> = match place.parent().filter(|_| place.ends_with("bin")) {
        Some(prefix) => INSTALLED.iter().map(|name| prefix.join(name)).collect(),
        None => BUILT.iter().map(|name| place.join(name)).collect(),
    };
    beside.into_iter().chain([program]).collect()
}

/// What the directory only has links to: it was shared from another file system. What is missing, QEMU says better.
fn elsewhere(directory: &Path, machine: &Machine) -> Vec<PathBuf> {
    let mut names = overlay::chain(directory, &machine.disk).unwrap_or_default();
    names.push(machine.memory.clone());
    names.iter().filter_map(|name| fs::canonicalize(directory.join(name)).ok()).collect()
}
