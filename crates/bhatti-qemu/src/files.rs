//! The layers of a VM's disk, and the memory of one that has not booted.

use std::io;
use std::path::Path;

use bhatti_host::durable;
use bhatti_types::MemoryMib;
use bhatti_vmm::new_name;

use crate::overlay;

/// The file for a memory in which nothing is.
const EMPTY_MEMORY: &str = "memory-empty.img";

/// A name for a layer that no other layer of this host has.
pub(crate) fn new_layer_name() -> io::Result<String> {
    new_name("disk-", ".qcow2")
}

/// Makes the memory of a VM that has not booted. Returns its name.
pub(crate) fn create_empty_memory(directory: &Path, size: MemoryMib) -> io::Result<String> {
    let file = durable::create_sealed(&directory.join(EMPTY_MEMORY))?;
    file.set_len(u64::from(size.get()) << 20)?;
    Ok(EMPTY_MEMORY.to_owned())
}

/// Puts a file that others stand on into `directory`, under `name`, without copying it. It is sealed: QEMU may write what is in its directory.
pub(crate) fn share(file: &Path, directory: &Path, name: &str) -> io::Result<()> {
    // It becomes root's, so that no VMM could unseal it even if its rules did not refuse that.
    match durable::seal(file).and_then(|()| bhatti_vmm::give_to(file, 0)) {
        // Another user's file is none that this user's QEMU could write, nor one of a file system that is not to be written.
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
