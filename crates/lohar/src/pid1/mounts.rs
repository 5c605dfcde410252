//! Mounts the kernel's file systems.

use std::ffi::CStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use crate::log;

struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    options: &'static CStr,
}

const NO_SUID_DEV_EXEC: MountFlags =
    MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const NO_SUID_DEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

const EARLY: [Mount; 2] = [
    Mount {
        source: "dev",
        target: "/dev",
        kind: "devtmpfs",
        flags: MountFlags::NOSUID,
        options: c"mode=0755",
    },
    Mount { source: "sys", target: "/sys", kind: "sysfs", flags: NO_SUID_DEV_EXEC, options: c"" },
];

const LATE: [Mount; 6] = [
    Mount { source: "proc", target: "/proc", kind: "proc", flags: NO_SUID_DEV_EXEC, options: c"" },
    Mount {
        source: "devpts",
        target: "/dev/pts",
        kind: "devpts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: c"newinstance,ptmxmode=0666,gid=5,mode=0620",
    },
    Mount {
        source: "shm",
        target: "/dev/shm",
        kind: "tmpfs",
        flags: NO_SUID_DEV,
        options: c"mode=1777",
    },
    Mount {
        source: "tmp",
        target: "/tmp",
        kind: "tmpfs",
        flags: NO_SUID_DEV,
        options: c"mode=1777",
    },
    Mount {
        source: "run",
        target: "/run",
        kind: "tmpfs",
        flags: NO_SUID_DEV,
        options: c"mode=0755",
    },
    Mount {
        source: "cgroup2",
        target: "/sys/fs/cgroup",
        kind: "cgroup2",
        flags: NO_SUID_DEV_EXEC,
        // Every command is moved to the users' cgroup. Without this option, each move waits for
        // an RCU grace period of some milliseconds.
        options: c"favordynmods",
    },
];

/// A device file whose module is loaded when the file is opened. The numbers are those of the
/// kernel's admin-guide/devices.txt.
struct Node {
    path: &'static str,
    major: u32,
    minor: u32,
    mode: u32,
}

/// All users may use the first two, as on desktops and servers: these devices only give access to
/// resources of the user.
const NODES: [Node; 3] = [
    Node { path: "/dev/net/tun", major: 10, minor: 200, mode: 0o666 },
    Node { path: "/dev/fuse", major: 10, minor: 229, mode: 0o666 },
    Node { path: "/dev/loop-control", major: 10, minor: 237, mode: 0o600 },
];

/// Mounts the file systems that are needed to find the root disk.
pub(super) fn early() -> io::Result<()> {
    EARLY.iter().try_for_each(Mount::mount)
}

fn has_entries(directory: &str) -> bool {
    std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}

/// Mounts the rest, inside the root disk. A mount that fails is reported and left out.
pub(super) fn late() {
    for mount in &LATE {
        // An image may bring files of its own there, which a mount would hide.
        if mount.target == "/tmp" && has_entries("/tmp") {
            continue;
        }
        if let Err(error) = mount.mount() {
            log::line(format_args!("failed to mount {} on {}: {error}", mount.kind, mount.target));
        }
    }
    // The pseudo-terminal multiplexer of the instance just mounted, in place of the kernel's.
    link_ptmx();
    for node in &NODES {
        if let Err(error) = node.make() {
            log::line(format_args!("failed to make {}: {error}", node.path));
        }
    }
}

/// Makes all mounts shared, as systemd does: those in a mount namespace that a container program
/// makes follow the ones made here.
pub(super) fn share() -> io::Result<()> {
    Ok(mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?)
}

fn link_ptmx() {
    let linked = match fs::remove_file("/dev/ptmx") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => std::os::unix::fs::symlink("pts/ptmx", "/dev/ptmx"),
    };
    if let Err(error) = linked {
        log::line(format_args!("failed to link /dev/ptmx: {error}"));
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        if let Err(error) = std::os::unix::fs::symlink(target, format!("/dev/{name}")) {
            log::line(format_args!("failed to link /dev/{name}: {error}"));
        }
    }
}

impl Node {
    fn make(&self) -> io::Result<()> {
        fs::create_dir_all(Path::new(self.path).parent().unwrap_or(Path::new("/dev")))?;
        let device = makedev(self.major, self.minor);
        match mknodat(CWD, self.path, FileType::CharacterDevice, Mode::RUSR, device) {
            // The kernel has the driver built in.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        fs::set_permissions(self.path, Permissions::from_mode(self.mode))
    }
}

impl Mount {
    fn mount(&self) -> io::Result<()> {
        fs::create_dir_all(self.target)?;
        match mount(self.source, self.target, self.kind, self.flags, self.options) {
            // Some kernels mount devtmpfs themselves.
            Ok(()) | Err(Errno::BUSY) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
