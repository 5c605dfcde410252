//! The layers of a VM's disk, and the memory of one that has not booted.

use std::fs::File;
use std::io;
use std::path::Path;

use bhatti_types::MemoryMib;
use bhatti_vmm::{new_name, share};

use crate::overlay;

/// The file for a memory in which nothing is.
const EMPTY_MEMORY: &str = "memory-empty.img";

/// A name for a layer that no other layer of this host has.
pub(crate) fn new_layer_name() -> io::Result<String> {
    new_name("disk-", ".qcow2")
}

/// Makes the memory of a VM that has not booted. Returns its name.
pub(crate) fn create_empty_memory(directory: &Path, size: MemoryMib) -> io::Result<String> {
    let file = File::create_new(directory.join(EMPTY_MEMORY))?;
    file.set_len(u64::from(size.get()) << 20)?;
    Ok(EMPTY_MEMORY.to_owned())
}

/// Shares all layers of a disk.
pub(crate) fn share_layers(from: &Path, top: &str, to: &Path) -> io::Result<()> {
    for layer in overlay::chain(from, top)? {
        share(&from.join(&layer), to, &layer)?;
    }
    Ok(())
}
