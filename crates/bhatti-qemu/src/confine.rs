//! What a VM's QEMU reaches of this host: its own directory, what its disk and memory stand on, its volumes, and what it is told to load.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use bhatti_engine::Accelerator;
use bhatti_host::process::{Confinement, Reach};

use crate::record::Machine;
use crate::{Setup, locate, overlay};

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
        write.push(Path::new("/dev/kvm"));
    }
    Confinement::new(Reach { run: &run, read: &read, write: &write })
}

/// Makes what QEMU writes this user's: without root's rights it cannot write what is another's, as volumes are that were in Firecracker's jail.
///
/// # Errors
///
/// Returns the error of chown(2).
pub(crate) fn make_own(directory: &Path, machine: &Machine) -> io::Result<()> {
    let user = rustix::process::geteuid();
    if !user.is_root() {
        return Ok(());
    }
    let volumes = machine.volumes.iter().flatten().filter(|volume| !volume.read_only);
    let written = volumes.map(|volume| volume.path.clone()).chain([directory.join(&machine.disk)]);
    for path in written {
        // What is missing, QEMU says better.
        if fs::metadata(&path).is_ok_and(|file| file.uid() != user.as_raw()) {
            chown(&path, Some(user.as_raw()), None)?;
        }
    }
    Ok(())
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
