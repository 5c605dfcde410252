//! The parts of a configuration that apply to a guest, but not in test mode.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown, fchown};
use std::path::Path;

use bhatti_proto::{AgentError, ConfigVolume, GuestConfig};
use rustix::mount::{MountFlags, mount};
use rustix::system::{sethostname, uname};

use super::texts;
use crate::refusal::io_refused;
use crate::user::USUAL_UID;
use crate::{disk, netlink};

const RESOLVERS: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";

/// The variables of the sandbox, for programs that have begun before they were known: they wait in
/// the snapshot of a template. As in `/proc/PID/environ`, NUL follows each.
const VARIABLES: &str = "/run/lohar/environment";

/// The largest file of which the other lines are kept when some are replaced, in bytes.
const SMALL_BYTES_MAX: u64 = 1 << 20;

/// The prefix of a device path that names a disk by its serial, as udev(7) does.
const BY_SERIAL: &str = "/dev/disk/by-id/virtio-";

/// Applies the configuration in a VM.
pub(super) fn apply(config: &GuestConfig) -> Result<(), AgentError> {
    if !config.hostname.is_empty() {
        let failed = |error| io_refused("set hostname", Path::new(&config.hostname), &error);
        set_hostname(&config.hostname).map_err(failed)?;
    }
    apply_network(config)?;
    apply_once(config, Disks::AsBooted)
}

/// Applies the configuration in a container. The host sets its name and its mounts.
pub(super) fn apply_in_container(config: &GuestConfig) -> Result<(), AgentError> {
    let hosts = Path::new(HOSTS);
    write_hosts("", &config.hostname).map_err(|error| io_refused("write", hosts, &error))?;
    if let Some(network) = &config.network {
        let failed =
            |error| io_refused("switch IPv6 off at", Path::new(&network.interface), &error);
        netlink::switch_off_ipv6(&network.interface).map_err(failed)?;
    }
    apply_network(config)?;
    set_resolvers_of(config)?;
    for volume in &config.volumes {
        let failed = |error| io_refused("chown", Path::new(&volume.mount), &error);
        give_volume(volume).map_err(failed)?;
    }
    Ok(())
}

fn apply_network(config: &GuestConfig) -> Result<(), AgentError> {
    let Some(network) = &config.network else { return Ok(()) };
    let failed = |error| io_refused("configure", Path::new(&network.interface), &error);
    netlink::configure(network).map(drop).map_err(failed)
}

/// Whether the guest's kernel knows its current disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disks {
    /// The disks are those of the boot.
    AsBooted,
    /// The disks were exchanged while the guest was saved, so the kernel knows the old ones.
    Exchanged,
}

/// Applies the settings that a guest gets only once.
pub(super) fn apply_once(config: &GuestConfig, disks: Disks) -> Result<(), AgentError> {
    set_resolvers_of(config)?;
    for volume in &config.volumes {
        let failed = |error| io_refused("mount", Path::new(&volume.mount), &error);
        mount_volume(volume, disks).map_err(failed)?;
    }
    Ok(())
}

fn set_resolvers_of(config: &GuestConfig) -> Result<(), AgentError> {
    if config.dns.is_empty() {
        return Ok(());
    }
    let failed = |error| io_refused("write", Path::new(RESOLVERS), &error);
    set_resolvers(&config.dns).map_err(failed)
}

/// Sets the name servers. Other lines of the file, such as `search` and `options`, stay.
pub(super) fn set_resolvers(servers: &[String]) -> io::Result<()> {
    let resolvers = Path::new(RESOLVERS);
    let before = read_small(resolvers).unwrap_or_default();
    // Remove a link, which may lead nowhere, and a file with several names, which is not for
    // resolvers alone.
    if fs::symlink_metadata(resolvers).is_ok_and(|found| !found.is_file() || found.nlink() != 1) {
        fs::remove_file(resolvers)?;
    }
    let file = small_file().custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(resolvers)?;
    overwrite(&file, &texts::resolvers(&before, servers))
}

/// Sets the host name, in the kernel and in the files that programs read.
pub(super) fn set_hostname(name: &str) -> io::Result<()> {
    let before = uname().nodename().to_string_lossy().into_owned();
    sethostname(name.as_bytes())?;
    write("/etc/hostname", &format!("{name}\n"))?;
    write_hosts(&before, name)
}

/// Sets the machine ID, by which programs identify the guest.
pub(super) fn set_machine_id(machine_id: &str) -> io::Result<()> {
    write("/etc/machine-id", &format!("{machine_id}\n"))
}

/// Replaces the host name `before` with `name` in `/etc/hosts`. Lines that users added stay.
fn write_hosts(before: &str, name: &str) -> io::Result<()> {
    let text = read_small(Path::new(HOSTS)).unwrap_or_default();
    write(HOSTS, &texts::hosts(&text, before, name))
}

/// Writes [`VARIABLES`], which are in memory alone. Root and the usual user can read them.
pub(super) fn write_variables(variables: &BTreeMap<String, String>) -> io::Result<()> {
    let path = Path::new(VARIABLES);
    let new = path.with_extension("new");
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o640).open(&new)?;
    for (name, value) in variables {
        write!(file, "{name}={value}\0")?;
    }
    fchown(&file, None, Some(USUAL_UID))?;
    fs::rename(&new, path)
}

fn mount_volume(volume: &ConfigVolume, disks: Disks) -> io::Result<()> {
    fs::create_dir_all(&volume.mount)?;
    let device = match volume.device.strip_prefix(BY_SERIAL) {
        Some(serial) => disk::find(serial, disks == Disks::Exchanged)?,
        None => volume.device.clone().into(),
    };
    let access = if volume.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let flags = MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV | access;
    mount(device.as_path(), volume.mount.as_str(), volume.fs.as_str(), flags, c"")?;
    give_volume(volume)
}

fn give_volume(volume: &ConfigVolume) -> io::Result<()> {
    // A volume that root owns is new, and is given to the usual user. Any other owner keeps the
    // volume.
    if !volume.read_only && fs::metadata(&volume.mount)?.uid() == 0 {
        chown(&volume.mount, Some(USUAL_UID), Some(USUAL_UID))?;
    }
    Ok(())
}

fn write(path: &str, text: &str) -> io::Result<()> {
    overwrite(&small_file().custom_flags(libc::O_NONBLOCK).open(path)?, text)
}

fn small_file() -> fs::OpenOptions {
    File::options().write(true).create(true).truncate(false).clone()
}

/// Reads a small text file.
///
/// # Errors
///
/// Returns `InvalidData` if the file has more than [`SMALL_BYTES_MAX`], or is not a text file.
fn read_small(path: &Path) -> io::Result<String> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = String::new();
    let length = file.take(SMALL_BYTES_MAX + 1).read_to_string(&mut text)?;
    if length as u64 > SMALL_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(text)
}

/// Replaces the content of a small file, which keeps its blocks on the disk. A file that is
/// truncated first frees its blocks and allocates others, and ext4 then writes to the disk as
/// soon as the file is closed. That took a tenth of the time that a fork needs for its identity.
fn overwrite(mut file: &File, text: &str) -> io::Result<()> {
    file.write_all(text.as_bytes())?;
    if file.metadata()?.len() > text.len() as u64 {
        file.set_len(text.len() as u64)
    } else {
        Ok(())
    }
}
