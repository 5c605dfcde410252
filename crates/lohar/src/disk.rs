//! Disks by their serial, which the host gave them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";

/// The device of the disk with this serial. With `probe_again`, the kernel looks at it as if for the first time: it may have another size now, and
/// be read only, which the kernel notices at no other moment.
pub(crate) fn find(serial: &str, probe_again: bool) -> io::Result<PathBuf> {
    let missing =
        || io::Error::new(io::ErrorKind::NotFound, format!("no disk has the serial `{serial}`"));
    if probe_again {
        let block = block_with(serial)?.ok_or_else(missing)?;
        let device = fs::canonicalize(block.join("device"))?;
        let name = device.file_name().ok_or_else(missing)?.to_string_lossy().into_owned();
        for step in ["unbind", "bind"] {
            fs::write(Path::new(DRIVER).join(step), &name)?;
        }
    }
    let block = block_with(serial)?.ok_or_else(missing)?;
    Ok(Path::new("/dev").join(block.file_name().unwrap_or_default()))
}

/// Where the kernel describes the disk with this serial, if it is there.
pub(crate) fn block_with(wanted: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let block = entry?.path();
        let serial = fs::read_to_string(block.join("serial"));
        if serial.is_ok_and(|serial| serial.trim_end() == wanted) {
            return Ok(Some(block));
        }
    }
    Ok(None)
}
