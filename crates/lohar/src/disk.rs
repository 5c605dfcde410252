//! Disks by their serial, which the host gave them; or by their order, where the hypervisor gives none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";

/// The variable with the names of all disks, in their order, divided by commas. The kernel makes one of each parameter that it does not know.
const IN_ORDER: &str = "BHATTI_DISKS";

/// The device of the disk with this serial. With `probe_again`, the kernel looks at it as if for the first time: it may have another size now, and
/// be read only, which the kernel notices at no other moment.
pub(crate) fn find(serial: &str, probe_again: bool) -> io::Result<PathBuf> {
    let missing =
        || io::Error::new(io::ErrorKind::NotFound, format!("no disk has the serial `{serial}`"));
    // Hypervisors that give no serials tell the guest of another size, and cannot begin anew with a disk.
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

/// Where the kernel describes the disk with this serial, if it is there.
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

/// What the kernel calls the disk of that name.
fn device_in_order(names: &str, wanted: &str) -> Option<String> {
    let position = names.split(',').position(|name| name == wanted)?;
    let letter = char::from(b'a'.checked_add(u8::try_from(position).ok()?)?);
    letter.is_ascii_lowercase().then(|| format!("vd{letter}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_without_serials_are_known_by_their_order() {
        let names = "root,volume0,volume1";
        assert_eq!(device_in_order(names, "root").as_deref(), Some("vda"));
        assert_eq!(device_in_order(names, "volume1").as_deref(), Some("vdc"));
        assert_eq!(device_in_order(names, "volume2"), None);
    }
}
