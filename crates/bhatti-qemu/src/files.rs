//! The files of a VM: its disk's layers and the memory that it stands on.
//!
//! Whatever a VM stands on lies in its own directory, as a hard link: nothing that anybody else removes takes it away, and the file
//! system counts who still needs it. Such files are never written.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use bhatti_types::MemoryMib;

use crate::overlay;

/// The file for a memory in which nothing is.
const EMPTY_MEMORY: &str = "memory-empty.img";

/// How the names of memory files begin and end.
const MEMORY_PREFIX: &str = "memory-";
const MEMORY_SUFFIX: &str = ".img";

/// The name of a memory file with this content.
pub(crate) fn memory_name(hash: &blake3::Hash) -> String {
    format!("{MEMORY_PREFIX}{}{MEMORY_SUFFIX}", &hash.to_hex()[..32])
}

/// A name for a layer that no other layer of this host has.
pub(crate) fn new_layer_name() -> io::Result<String> {
    let number = getrandom::u64().map_err(io::Error::other)?;
    Ok(format!("disk-{number:016x}.qcow2"))
}

/// Makes the memory of a VM that has not booted. Returns its name.
pub(crate) fn create_empty_memory(directory: &Path, size: MemoryMib) -> io::Result<String> {
    let file = File::create_new(directory.join(EMPTY_MEMORY))?;
    file.set_len(u64::from(size.get()) << 20)?;
    Ok(EMPTY_MEMORY.to_owned())
}

/// Puts a file of an earlier owner into `directory`, under `name`, without copying it. It may be there already.
pub(crate) fn share(file: &Path, directory: &Path, name: &str) -> io::Result<()> {
    let place = directory.join(name);
    match fs::hard_link(file, &place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // On another file system a name has to do.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            std::os::unix::fs::symlink(fs::canonicalize(file)?, place)
        }
        linked => linked,
    }
}

/// Shares all layers of a disk.
pub(crate) fn share_layers(from: &Path, top: &str, to: &Path) -> io::Result<()> {
    for layer in overlay::chain(from, top)? {
        share(&from.join(&layer), to, &layer)?;
    }
    Ok(())
}

/// Removes the memory files that a VM does not stand on any more.
pub(crate) fn remove_other_memory(directory: &Path, kept: &str) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(MEMORY_PREFIX) && name.ends_with(MEMORY_SUFFIX) && name != kept {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
