//! The parts of a configuration that only a guest of its own has.

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::Path;

use bhatti_proto::{AgentError, ConfigVolume, GuestConfig};
use rustix::mount::{MountFlags, mount};
use rustix::system::sethostname;

use crate::netlink;
use crate::refusal::io_refused;
use crate::user::USUAL_UID;

/// Makes the guest what the configuration says.
pub(super) fn apply(config: &GuestConfig) -> Result<(), AgentError> {
    if !config.hostname.is_empty() {
        let failed = |error| io_refused("set hostname", Path::new(&config.hostname), &error);
        set_hostname(&config.hostname).map_err(failed)?;
    }
    if let Some(network) = &config.network {
        let failed = |error| io_refused("configure", Path::new(&network.interface), &error);
        netlink::configure(network).map_err(failed)?;
    }
    apply_once(config)
}

/// Makes what a guest gets once and never again.
pub(super) fn apply_once(config: &GuestConfig) -> Result<(), AgentError> {
    if !config.dns.is_empty() {
        let path = Path::new("/etc/resolv.conf");
        let lines: String =
            config.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
        replace(path, &lines).map_err(|error| io_refused("write", path, &error))?;
    }
    for volume in &config.volumes {
        let failed = |error| io_refused("mount", Path::new(&volume.mount), &error);
        mount_volume(volume).map_err(failed)?;
    }
    Ok(())
}

/// Gives the guest a name, for processes that run and for files that others read.
pub(super) fn set_hostname(name: &str) -> io::Result<()> {
    sethostname(name.as_bytes())?;
    fs::write("/etc/hostname", format!("{name}\n"))?;
    fs::write("/etc/hosts", format!("127.0.0.1 localhost {name}\n::1 localhost\n"))
}

fn mount_volume(volume: &ConfigVolume) -> io::Result<()> {
    fs::create_dir_all(&volume.mount)?;
    let access = if volume.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let flags = MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV | access;
    mount(volume.device.as_str(), volume.mount.as_str(), volume.fs.as_str(), flags, c"")?;
    if !volume.read_only {
        chown(&volume.mount, Some(USUAL_UID), Some(USUAL_UID))?;
    }
    Ok(())
}

/// Replaces a file that may be a link to somewhere that is not there.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::write(path, text),
    }
}
