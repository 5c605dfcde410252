//! The layers of a VM's disk, and the memory file of a VM to boot.

use std::fs;
use std::io;
use std::path::Path;

use bhatti_engine::{NewRoot, VmSpec};
use bhatti_host::durable;
use bhatti_types::{DiskMib, MemoryMib};
use bhatti_vmm::{new_name, recorded_machine};

use crate::overlay;

/// Name of the file of an empty memory.
const EMPTY_MEMORY: &str = "memory-empty.img";

/// Creates the disk of a VM to boot over the image, or finds the kept one. Returns the name of
/// the topmost layer.
pub(crate) fn boot_disk(spec: &VmSpec) -> io::Result<String> {
    let directory = &spec.directory;
    match &spec.root_base {
        None => Ok(recorded_machine(directory)?.disk),
        Some(base) => new_disk(directory, &NewRoot { base: base.clone(), disk: spec.disk }),
    }
}

/// Creates a disk over an image. Returns the name of its only layer.
pub(crate) fn new_disk(directory: &Path, root: &NewRoot) -> io::Result<String> {
    let base = root.base.file_name().and_then(|name| name.to_str());
    let base = base.ok_or(io::ErrorKind::InvalidFilename)?;
    share(&root.base, directory, base)?;
    let disk = new_layer_name()?;
    let bytes = root.disk.map_or(0, DiskMib::bytes);
    overlay::create_sized(&directory.join(&disk), base, bytes).map_err(io::Error::other)?;
    Ok(disk)
}

/// Returns a name for a layer that no other layer of this host has.
fn new_layer_name() -> io::Result<String> {
    new_name("disk-", ".qcow2")
}

/// Creates an empty layer over the layer `disk`. Returns its name.
pub(crate) fn add_layer(directory: &Path, disk: &str) -> io::Result<String> {
    let layer = new_layer_name()?;
    overlay::create(&directory.join(&layer), disk).map_err(io::Error::other)?;
    Ok(layer)
}

/// Creates the memory file of a VM to boot. Returns its name.
pub(crate) fn create_empty_memory(directory: &Path, size: MemoryMib) -> io::Result<String> {
    let path = directory.join(EMPTY_MEMORY);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = durable::create_sealed(&path)?;
    file.set_len(u64::from(size.get()) << 20)?;
    Ok(EMPTY_MEMORY.to_owned())
}

/// Links a shared file into `directory`, under `name`, without copying it. Seals the file,
/// because QEMU may write the files in its directory.
pub(crate) fn share(file: &Path, directory: &Path, name: &str) -> io::Result<()> {
    // Root becomes the owner, so that no VMM could unseal the file even if its rules allowed
    // that.
    match durable::seal(file).and_then(|()| bhatti_vmm::give_to(file, 0)) {
        // If this user may not seal the file, or its file system is read-only, this user's QEMU
        // cannot write it either.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) => {}
        settled => settled?,
    }
    bhatti_vmm::share(file, directory, name)
}

/// Shares all layers of a disk.
pub(crate) fn share_layers(from: &Path, top: &str, to: &Path) -> io::Result<()> {
    for layer in overlay::chain(from, top)? {
        share(&from.join(&layer), to, &layer)?;
    }
    Ok(())
}
