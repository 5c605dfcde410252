//! Disk images: creation, copies, FUSE exports, mounts and checks.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::log::{PAGE, SECTOR};
use super::{run_program, text, wait_until};

/// A file system that a data directory may lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Returns the size of the pieces that the file system expects a disk to write atomically, in
    /// bytes.
    ///
    /// ext4 replays whole blocks from its journal, so a torn block does no harm. XFS does not
    /// replay a block whose header is new, so a directory's block that is torn after its first
    /// sector fails its checksum, and the file system cannot be mounted (seen with Linux 6.12).
    pub(super) const fn whole_piece(self) -> u64 {
        match self {
            Self::Ext4 => SECTOR,
            Self::Xfs => PAGE,
        }
    }

    /// Whether the file system on `disk` is sound. The journal must have been replayed.
    pub(super) fn is_sound(self, disk: &Path) -> Result<bool> {
        let command: &[&str] = match self {
            Self::Ext4 => &["e2fsck", "-fn"],
            Self::Xfs => &["xfs_repair", "-n", "-f"],
        };
        let ran =
            Command::new(command[0]).args(&command[1..]).arg(disk).output().context(command[0])?;
        Ok(ran.status.success())
    }
}

impl FromStr for FileSystem {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            _ => bail!("unknown file system {name}: ext4 or xfs"),
        }
    }
}

/// Makes a sparse disk with an empty file system.
pub(super) fn make(file_system: FileSystem, disk: &Path, bytes: u64) -> Result<()> {
    File::create_new(disk)?.set_len(bytes)?;
    match file_system {
        FileSystem::Ext4 => run_program("mkfs.ext4", &["-q", "-F", &text(disk)]),
        FileSystem::Xfs => run_program("mkfs.xfs", &["-q", "-f", &text(disk)]),
    }
}

/// Copies a sparse file.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    run_program("cp", &["--sparse=always", &text(from), &text(to)])
}

/// Mounts a disk's file system at `at` in this mount namespace. The kernel frees the loop device at
/// the unmount.
pub(super) fn mount(disk: &Path, at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    let mut magic = [0; 4];
    File::open(disk)?.read_exact(&mut magic)?;
    // Each worker mounts a copy of one disk, and XFS refuses a second one with the same UUID.
    let options = if magic == *b"XFSB" { "loop,nouuid" } else { "loop" };
    run_program("mount", &["-o", options, &text(disk), &text(at)])
}

/// Unmounts the exports that an interrupted run has left below `work`.
pub(super) fn unmount_left_overs(work: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    for point in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(point).starts_with(work) {
            run_program("umount", &["-l", point])?;
        }
    }
    Ok(())
}

/// A disk that a `qemu-storage-daemon` exports as a file. Dropping this value ends the export.
#[derive(Debug)]
pub(super) struct Export {
    file: PathBuf,
    process: Child,
}

impl Export {
    /// Exports `disk` at `file` and logs each request to `log`.
    pub(super) fn logged(file: &Path, disk: &Path, log: &Path) -> Result<Self> {
        let top = "driver=blklogwrites,node-name=top,file=disk,log=log,log-sector-size=512,\
                   log-super-update-interval=1";
        Self::start(file, &[&node("disk", disk, ""), &node("log", log, ""), top])
    }

    /// Exports at `file` a disk with the content of `base`. Writes go to the new qcow2 file
    /// `overlay`.
    pub(super) fn overlay(file: &Path, base: &Path, overlay: &Path) -> Result<Self> {
        let backing = text(base);
        run_program(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &backing, &text(overlay)],
        )?;
        let low = node("low", base, ",read-only=on");
        Self::start(
            file,
            &[&low, &node("over", overlay, ""), "driver=qcow2,node-name=top,file=over,backing=low"],
        )
    }

    /// Exports the node `top` of these block nodes.
    fn start(file: &Path, nodes: &[&str]) -> Result<Self> {
        File::create(file)?;
        let device = fs::metadata(file)?.dev();
        // The export ends with this program, however this program ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "qemu-storage-daemon"]);
        for node in nodes {
            command.args(["--blockdev", node]);
        }
        command
            .arg("--export")
            .arg(format!("type=fuse,id=e,node-name=top,mountpoint={},writable=on", file.display()));
        let process = command.stdin(Stdio::null()).spawn().context("qemu-storage-daemon")?;
        let mut export = Self { file: file.to_owned(), process };
        let mut ended = false;
        let mounted = wait_until(Duration::from_secs(20), || {
            ended = matches!(export.process.try_wait(), Ok(Some(_)));
            ended || fs::metadata(file).is_ok_and(|it| it.dev() != device)
        });
        ensure!(mounted && !ended, "qemu-storage-daemon did not export {}", file.display());
        Ok(export)
    }

    /// Waits until no loop device uses the file: a namespace's mounts end after the namespace.
    pub(super) fn wait_for_release(&self) -> Result<()> {
        let released = wait_until(Duration::from_secs(30), || {
            let devices = Command::new("losetup").arg("-j").arg(&self.file).output();
            devices.is_ok_and(|it| it.stdout.is_empty())
        });
        ensure!(released, "a loop device still uses {}", self.file.display());
        Ok(())
    }

    /// Waits for the release and ends the export.
    pub(super) fn close(mut self) -> Result<()> {
        self.wait_for_release()?;
        self.end();
        Ok(())
    }

    fn end(&mut self) {
        let _gone_already = kill_process(Pid::from_child(&self.process), Signal::TERM);
        let _reaped = self.process.wait();
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            self.end();
        }
    }
}

/// Returns the options of a block node on a file. It does not flush the host's disk, because only
/// the log counts.
fn node(name: &str, file: &Path, more: &str) -> String {
    format!("driver=file,node-name={name},filename={},cache.no-flush=on{more}", file.display())
}
