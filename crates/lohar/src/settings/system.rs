//! The parts of a configuration that only a guest of its own has.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use bhatti_proto::{AgentError, ConfigVolume, GuestConfig};
use rustix::mount::{MountFlags, mount};
use rustix::system::sethostname;

use crate::refusal::io_refused;
use crate::user::USUAL_UID;
use crate::{disk, netlink};

const RESOLVERS: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";

/// How a device is named by the serial of its disk: as udev(7) does.
const BY_SERIAL: &str = "/dev/disk/by-id/virtio-";

/// Makes the guest what the configuration says.
pub(super) fn apply(config: &GuestConfig) -> Result<(), AgentError> {
    if !config.hostname.is_empty() {
        let failed = |error| io_refused("set hostname", Path::new(&config.hostname), &error);
        set_hostname(&config.hostname).map_err(failed)?;
    }
    apply_network(config)?;
    apply_once(config, Disks::AsBooted)
}

/// Makes a container what the configuration says. Its name and its mounts are the host's to make.
pub(super) fn apply_in_container(config: &GuestConfig) -> Result<(), AgentError> {
    let hosts = Path::new(HOSTS);
    write_hosts(&config.hostname).map_err(|error| io_refused("write", hosts, &error))?;
    apply_network(config)?;
    set_resolvers_of(config)?;
    for volume in &config.volumes {
        let failed = |error| io_refused("give", Path::new(&volume.mount), &error);
        give_volume(volume).map_err(failed)?;
    }
    Ok(())
}

fn apply_network(config: &GuestConfig) -> Result<(), AgentError> {
    let Some(network) = &config.network else { return Ok(()) };
    let failed = |error| io_refused("configure", Path::new(&network.interface), &error);
    netlink::configure(network).map(drop).map_err(failed)
}

/// What the guest's kernel knows of its disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disks {
    /// What they are.
    AsBooted,
    /// What they were before it was saved: others are in their places now.
    Exchanged,
}

/// Makes what a guest gets once and never again.
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

/// Says who knows names.
pub(super) fn set_resolvers(servers: &[String]) -> io::Result<()> {
    let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    replace(Path::new(RESOLVERS), &lines)
}

/// Gives the guest a name, for processes that run and for files that others read.
pub(super) fn set_hostname(name: &str) -> io::Result<()> {
    sethostname(name.as_bytes())?;
    fs::write("/etc/hostname", format!("{name}\n"))?;
    write_hosts(name)
}

fn write_hosts(name: &str) -> io::Result<()> {
    fs::write(HOSTS, format!("127.0.0.1 localhost {name}\n::1 localhost\n"))
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
    // One that is nobody's yet is the usual user's; whom a user gave it to keeps it.
    if !volume.read_only && fs::metadata(&volume.mount)?.uid() == 0 {
        chown(&volume.mount, Some(USUAL_UID), Some(USUAL_UID))?;
    }
    Ok(())
}

/// Replaces a file that may be a link to somewhere that is not there.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        // In a container it is mounted, and so is a file.
        Err(error)
            if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy) =>
        {
            Err(error)
        }
        _ => fs::write(path, text),
    }
}
