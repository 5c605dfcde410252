//! The host's files that a VM's QEMU can access: its own directory, the files of its disk and
//! memory, its volumes, and the files that it loads.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bhatti_engine::Accelerator;
use bhatti_host::process::{self, Confinement, Reach, User};
use bhatti_vmm::{Launch, Machine};

use crate::{Qemu, locate, overlay};

/// Space for a layer's metadata, in addition to an eighth of the disk's size.
const TABLE_BYTES: u64 = 64 << 20;

const KVM: &str = "/dev/kvm";

/// The directories of a self-built QEMU's libraries and firmware: beside the `bin` directory of
/// an installed program, or beside a program in its build directory.
const INSTALLED: [&str; 6] =
    ["lib", "lib64", "libexec", "share/qemu", "share/seabios", "share/qemu-firmware"];
const BUILT: [&str; 2] = ["pc-bios", "qemu-bundle"];

/// Returns the rules for a QEMU that loads the files `loaded` and runs as `user`.
pub(crate) fn confinement(
    qemu: &Qemu,
    launch: &Launch<'_>,
    loaded: &[&Path],
    user: Option<User>,
) -> io::Result<Confinement> {
    let Launch { directory, machine, .. } = *launch;
    let (program, elsewhere) = (program(&qemu.program), elsewhere(directory, machine));
    let run: Vec<&Path> = program.iter().map(PathBuf::as_path).collect();
    let mut read: Vec<&Path> = elsewhere.iter().map(PathBuf::as_path).collect();
    read.extend(loaded);
    let mut write = vec![directory];
    for volume in machine.volumes.iter().flatten() {
        if volume.read_only { &mut read } else { &mut write }.push(&volume.path);
    }
    if qemu.accelerator == Accelerator::Kvm {
        write.push(Path::new(KVM));
    }
    let reach = Reach { run: &run, read: &read, write: &write };
    let confinement = Confinement::new(reach)?.with_files_up_to(file_bytes(directory, machine)?);
    Ok(match user {
        Some(user) => confinement.as_user(user),
        None => confinement,
    })
}

/// Makes QEMU's user the owner of the files that QEMU writes, if the daemon is root: without
/// root's rights, QEMU cannot write another user's files.
///
/// # Errors
///
/// Returns the error of chown(2).
pub(crate) fn give_to(user: u32, directory: &Path, machine: &Machine) -> io::Result<()> {
    let volumes = machine.volumes.iter().flatten().filter(|volume| !volume.read_only);
    let written = volumes.map(|volume| volume.path.clone()).chain([directory.join(&machine.disk)]);
    written.into_iter().try_for_each(|path| bhatti_vmm::give_to(&path, user))
}

/// Returns the length of the longest file that QEMU may write, in bytes: a full layer of its disk
/// with the tables of qcow2, or a volume.
///
/// # Errors
///
/// Returns the error of reading the disk's layers.
fn file_bytes(directory: &Path, machine: &Machine) -> io::Result<u64> {
    // The image's size, because a QEMU wrote the headers of the layers above the image.
    let layers = overlay::chain(directory, &machine.disk)?;
    let image = layers.last().map(|layer| fs::metadata(directory.join(layer))).transpose()?;
    let disk = image.map_or(0, |image| image.len()).max(machine.disk_bytes);
    let volumes = machine.volumes.iter().flatten();
    let volume =
        volumes.filter_map(|volume| fs::metadata(&volume.path).ok()).map(|file| file.len()).max();
    Ok(disk.saturating_add(disk / 8).saturating_add(TABLE_BYTES).max(volume.unwrap_or_default()))
}

/// Returns the user that QEMU runs as, if it can be another user than the daemon's. QEMU may read
/// every file that its rules allow, regardless of the owner: layers and memory files are shared.
pub(crate) fn user(qemu: &Qemu, user: u32) -> Option<User> {
    if !process::can_use_users() {
        return None;
    }
    let group = match qemu.accelerator {
        Accelerator::Kvm => group_for_kvm(&fs::metadata(KVM).ok()?)?,
        Accelerator::Tcg => None,
    };
    Some(User { id: user, group, reads_all: true })
}

/// Returns the group that another user needs to open the device, if any. Returns `None` if only
/// the owner or root's group can open it.
fn group_for_kvm(device: &fs::Metadata) -> Option<Option<u32>> {
    const GROUP: u32 = 0o060;
    const OTHERS: u32 = 0o006;
    if device.mode() & OTHERS == OTHERS {
        return Some(None);
    }
    (device.mode() & GROUP == GROUP && device.gid() != 0).then_some(Some(device.gid()))
}

/// Returns the program's path and the directories of its libraries and firmware.
fn program(name: &Path) -> Vec<PathBuf> {
    let Some(program) = locate(name) else { return Vec::new() };
    let Some(place) = program.parent() else { return Vec::new() };
    let beside: Vec<PathBuf> = match place.parent().filter(|_| place.ends_with("bin")) {
        Some(prefix) => INSTALLED.iter().map(|name| prefix.join(name)).collect(),
        None => BUILT.iter().map(|name| place.join(name)).collect(),
    };
    beside.into_iter().chain([program]).collect()
}

/// Returns the resolved paths of the layers and the memory file: some are symbolic links to
/// another file system. Skips missing files, because QEMU reports those better.
fn elsewhere(directory: &Path, machine: &Machine) -> Vec<PathBuf> {
    let mut names = overlay::chain(directory, &machine.disk).unwrap_or_default();
    names.extend(machine.memory.clone());
    names.iter().filter_map(|name| fs::canonicalize(directory.join(name)).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_of_files_follows_the_size_of_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let image = fs::File::create(directory.join("root.ext4")).unwrap();
        image.set_len(4 << 30).unwrap();
        overlay::create(&directory.join("top.qcow2"), "root.ext4").unwrap();
        let machine = |disk_bytes| Machine {
            cpus: 1,
            memory_mib: 512,
            memory: None,
            is_unsaved: true,
            disk: "top.qcow2".to_owned(),
            disk_bytes,
            has_network: false,
            volumes: Vec::new(),
        };

        let of_image = file_bytes(directory, &machine(0)).unwrap();
        let of_disk = file_bytes(directory, &machine(20 << 30)).unwrap();

        assert!((4 << 30..5 << 30).contains(&of_image), "{of_image}");
        assert!(of_disk > 20 << 30, "a full disk takes more than 20 GiB, not {of_disk}");
    }
}
