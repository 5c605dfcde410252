//! Finds disks by the serial that the host gave them, or by their order if the hypervisor gives
//! none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";

/// The environment variable that lists the names of all disks in order, separated by commas. The
/// kernel turns each command-line parameter that it does not know into such a variable.
const IN_ORDER: &str = "BHATTI_DISKS";

/// Returns the device of the disk with this serial. With `probe_again`, the kernel probes the
/// disk anew: its size may have changed, or it may be read-only now, which the kernel notices
/// only in a probe.
pub(crate) fn find(serial: &str, probe_again: bool) -> io::Result<PathBuf> {
    let missing =
        || io::Error::new(io::ErrorKind::NotFound, format!("no disk has the serial `{serial}`"));
    // Hypervisors without serials notify the guest of a changed size, and do not support probing
    // a disk anew.
    if probe_again && std::env::var_os(IN_ORDER).is_none() {
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

/// Returns the sysfs directory of the disk with this serial, if the disk exists.
pub(crate) fn block_with(wanted: &str) -> io::Result<Option<PathBuf>> {
    if let Ok(names) = std::env::var(IN_ORDER) {
        let block = device_in_order(&names, wanted).map(|name| Path::new("/sys/block").join(name));
        return Ok(block.filter(|block| block.exists()));
    }
    for entry in fs::read_dir("/sys/block")? {
        let block = entry?.path();
        let serial = fs::read_to_string(block.join("serial"));
        if serial.is_ok_and(|serial| serial.trim_end() == wanted) {
            return Ok(Some(block));
        }
    }
    Ok(None)
}

/// Returns the kernel's name of the disk called `wanted`.
fn device_in_order(names: &str, wanted: &str) -> Option<String> {
    let position = names.split(',').position(|name| name == wanted)?;
    let letter = char::from(b'a'.checked_add(u8::try_from(position).ok()?)?);
    letter.is_ascii_lowercase().then(|| format!("vd{letter}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_without_serials_are_found_by_their_order() {
        let names = "root,volume0,volume1";
        assert_eq!(device_in_order(names, "root").as_deref(), Some("vda"));
        assert_eq!(device_in_order(names, "volume1").as_deref(), Some("vdc"));
        assert_eq!(device_in_order(names, "volume2"), None);
    }
}
