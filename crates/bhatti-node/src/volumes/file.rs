//! A volume's file: a bare ext4 file system, made and repaired by e2fsprogs, and never mounted by
//! this module.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, fchown};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use bhatti_host::blocking;
use bhatti_host::process::{Confinement, Reach, User};
use bhatti_host::{disk, durable, process};
use bhatti_types::VolumeMib;

use tokio::time::{Duration, Instant, sleep, timeout};

use super::on_thread;

/// Owner of a new volume's root directory: the guest's usual user.
const ROOT_OWNER: &str = "1000:1000";

/// Offset and size of the superblock. Offsets in it: the magic number, the state, and the features
/// that a mounting kernel must support.
const SUPERBLOCK_OFFSET: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: (usize, [u8; 2]) = (0x38, [0x53, 0xef]);
const STATE: usize = 0x3a;
const INCOMPATIBLE: usize = 0x60;

/// State of a file system that was unmounted cleanly, and feature of one whose journal must be
/// replayed.
const CLEAN: u8 = 1;
const NEEDS_RECOVERY: u8 = 4;

/// Exit bits of e2fsck after a repair: it corrected all errors, and a mounted file system would
/// need a reboot.
const MENDED: i32 = 1 | 2;

/// How long a caller waits for a tool. A guest wrote the volume's content, and may have made it
/// take forever.
pub(super) const CHECK_LIMIT: Duration = Duration::from_secs(300);

/// Time limit for a check of a whole volume, which only reads. A guest may have made it slow.
const WHOLE_CHECK_LIMIT: Duration = Duration::from_secs(3600);

/// User that tools run as, if the daemon runs as root.
const TOOL_USER: u32 = process::USERS.start - 1;
/// The file that a tool works on: its standard input, which needs no right to enter any directory.
const HELD: &str = "/proc/self/fd/0";
/// Other files that tools read: the settings of mkfs.ext4, and the list of mounted file systems.
/// Landlock keeps tools from the private parts of other processes in /proc.
const READ: [&str; 2] = ["/etc/mke2fs.conf", "/proc"];

/// Interval of attempts to lock a volume's file.
const LOCK_LOOK: Duration = Duration::from_millis(50);

/// Maximum length of a tool's output that is passed on, in bytes.
const SAID_BYTES_MAX: usize = 4096;

/// A volume's file could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeFileError {
    /// A file could not be read or written.
    #[error("failed to {step}")]
    File {
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A tool could not be run.
    #[error("failed to run `{tool}`")]
    Tool {
        /// The tool.
        tool: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("`{tool}` failed: {message}")]
    Failed {
        /// The tool.
        tool: &'static str,
        /// The tool's output.
        message: String,
    },
    /// A tool still works on the volume.
    #[error("the volume is still being checked, made or copied after {} s", CHECK_LIMIT.as_secs())]
    Slow,
    /// The file system is damaged beyond automatic repair.
    #[error("the volume is damaged and was not repaired automatically; `e2fsck`: {message}")]
    Damaged {
        /// The output of e2fsck.
        message: String,
    },
}

pub(super) fn failed(step: &'static str) -> impl Fn(io::Error) -> VolumeFileError {
    move |source| VolumeFileError::File { step, source }
}

/// Creates a directory that only its owner can access.
pub(super) fn create_private(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Makes an empty file system. Its file takes almost no disk space.
pub(super) async fn make(path: &Path, size: VolumeMib) -> Result<(), VolumeFileError> {
    let create = || File::create_new(path)?.set_len(size.bytes());
    blocking(create).map_err(failed("create the volume's file"))?;
    let locked = hold(path).await?;
    let owner = format!("root_owner={ROOT_OWNER}");
    run("mkfs.ext4", &["-q", "-F", "-m", "0", "-E", &owner], &locked).await?;
    sync(path).await
}

/// Copies a file that no tool and no VM writes.
pub(super) async fn copy(from: &Path, to: &Path) -> Result<(), VolumeFileError> {
    let (source, target) = (from.to_owned(), to.to_owned());
    let copied = on_thread(move || disk::copy(&source, &target)).await;
    copied.map_err(failed("copy the volume's file"))?;
    sync(to).await
}

/// Copies a file system whole, after repairing it if it was not unmounted cleanly.
pub(super) async fn clone(from: &Path, to: &Path) -> Result<(), VolumeFileError> {
    let locked = hold(from).await?;
    settle_held(&locked).await?;
    copy(from, to).await
}

/// Grows the file system. Another call finishes a call that was interrupted.
pub(super) async fn grow(path: &Path, size: VolumeMib) -> Result<(), VolumeFileError> {
    let locked = hold(path).await?;
    check(&locked, &["-f"]).await?;
    blocking(|| lengthen(path, size)).map_err(failed("grow the volume's file"))?;
    run("resize2fs", &[], &locked).await?;
    sync(path).await
}

fn lengthen(path: &Path, size: VolumeMib) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    // Never shorten the file: that would cut off content.
    if file.metadata()?.len() < size.bytes() {
        file.set_len(size.bytes())?;
    }
    Ok(())
}

/// Returns the size of the file, if a volume may have that size.
pub(super) fn size(path: &Path) -> Option<VolumeMib> {
    VolumeMib::try_from(fs::metadata(path).ok()?.len() >> 20).ok()
}

/// Replays the journal of a file system that was not unmounted cleanly, and repairs what can be
/// repaired automatically.
pub(super) async fn settle(path: &Path) -> Result<(), VolumeFileError> {
    settle_held(&hold(path).await?).await
}

pub(super) async fn settle_held(locked: &LockedFile) -> Result<(), VolumeFileError> {
    if blocking(|| is_clean(&locked.path)).map_err(failed("read the volume's file"))? {
        return Ok(());
    }
    tracing::info!(path = %locked.path.display(), "A volume was not unmounted cleanly; it is checked");
    check(locked, &[]).await?;
    sync(&locked.path).await
}

/// Returns whether a full check by e2fsck finds no error. The check writes nothing, so it is ended
/// after an hour.
pub(super) async fn is_sound(locked: &LockedFile) -> Result<bool, VolumeFileError> {
    let checked = run_to_its_end("e2fsck", &["-f", "-n"], locked, IfDropped::Killed);
    let checked = timeout(WHOLE_CHECK_LIMIT, checked).await;
    Ok(checked.unwrap_or(Err(VolumeFileError::Slow))?.status.success())
}

/// Repairs what can be repaired automatically.
pub(super) async fn repair(locked: &LockedFile) -> Result<(), VolumeFileError> {
    check(locked, &["-f"]).await?;
    sync(&locked.path).await
}

/// A locked volume file. Tools inherit the lock, so a tool that outlives this daemon keeps the
/// next daemon away.
pub(super) struct LockedFile {
    file: File,
    pub(super) path: PathBuf,
}

pub(super) async fn hold(path: &Path) -> Result<LockedFile, VolumeFileError> {
    let file = blocking(|| File::open(path)).map_err(failed("open the volume's file"))?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(LockedFile { file, path: path.to_owned() }),
            Err(TryLockError::Error(source)) => {
                return Err(failed("lock the volume's file")(source));
            }
            Err(TryLockError::WouldBlock) if began.elapsed() > CHECK_LIMIT => {
                return Err(VolumeFileError::Slow);
            }
            Err(TryLockError::WouldBlock) => sleep(LOCK_LOOK).await,
        }
    }
}

async fn check(locked: &LockedFile, options: &[&str]) -> Result<(), VolumeFileError> {
    let output = output("e2fsck", &[&["-p"], options].concat(), locked).await?;
    match output.status.code() {
        Some(code) if code & !MENDED == 0 => Ok(()),
        _ => {
            let message = message_of(&output.stdout, &locked.path)
                + &message_of(&output.stderr, &locked.path);
            Err(VolumeFileError::Damaged { message })
        }
    }
}

async fn run(
    tool: &'static str,
    options: &[&str],
    locked: &LockedFile,
) -> Result<(), VolumeFileError> {
    let output = output(tool, options, locked).await?;
    if output.status.success() {
        return Ok(());
    }
    Err(VolumeFileError::Failed { tool, message: message_of(&output.stderr, &locked.path) })
}

/// Runs a tool on a file to its end, even if the caller stops waiting: a tool is never stopped
/// halfway. A guest wrote the content that the tool reads, so the tool reaches that file and
/// nothing else; under a daemon that is root, it is a user of its own.
async fn output(
    tool: &'static str,
    options: &[&str],
    locked: &LockedFile,
) -> Result<Output, VolumeFileError> {
    let ran = timeout(CHECK_LIMIT, run_to_its_end(tool, options, locked, IfDropped::GoesOn)).await;
    ran.unwrap_or(Err(VolumeFileError::Slow))
}

/// Whether a tool is killed if the future that runs it is dropped. A tool that writes must go on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IfDropped {
    GoesOn,
    Killed,
}

/// [`output`] without a time limit.
async fn run_to_its_end(
    tool: &'static str,
    options: &[&str],
    locked: &LockedFile,
    if_dropped: IfDropped,
) -> Result<Output, VolumeFileError> {
    let failed = |source| VolumeFileError::Tool { tool, source };
    let lock = locked.file.try_clone().map_err(failed)?;
    let read = READ.map(Path::new);
    let reach = Reach { read: &read, write: &[&locked.path], ..Reach::default() };
    let mut confinement = Confinement::new(reach).map_err(failed)?;
    if process::can_use_users() {
        confinement = confinement.as_user(User { id: TOOL_USER, group: None, reads_all: false });
        give_to(locked, TOOL_USER).map_err(failed)?;
    }
    let mut command = process::command(tool);
    command.args(options).arg(HELD).stdin(Stdio::from(lock));
    command.kill_on_drop(if_dropped == IfDropped::Killed);
    process::confine(&mut command, confinement);
    let ran = command.output().await.map_err(failed);
    if process::can_use_users() {
        give_to(locked, 0).map_err(failed)?;
    }
    ran
}

/// Gives the file to a user. A tool that runs longer than the limit keeps the file; the next tool
/// or VMM is given it then.
fn give_to(locked: &LockedFile, user: u32) -> io::Result<()> {
    fchown(&locked.file, Some(user), None)
}

/// Returns whether a file system was unmounted cleanly. False if there is no file system.
fn is_clean(path: &Path) -> io::Result<bool> {
    let mut superblock = [0; SUPERBLOCK_BYTES];
    File::open(path)?.read_exact_at(&mut superblock, SUPERBLOCK_OFFSET)?;
    let (at, magic) = MAGIC;
    Ok(superblock[at..at + 2] == magic
        && superblock[STATE] == CLEAN
        && superblock[INCOMPATIBLE] & NEEDS_RECOVERY == 0)
}

/// Returns a tool's output, without the name of our file.
fn message_of(output: &[u8], path: &Path) -> String {
    let output = &output[..output.len().min(SAID_BYTES_MAX)];
    let text = String::from_utf8_lossy(output).replace(&*path.to_string_lossy(), "the volume");
    let text = text.replace(HELD, "the volume");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

async fn sync(path: &Path) -> Result<(), VolumeFileError> {
    let file = path.to_owned();
    let synced = on_thread(move || {
        File::open(&file)?.sync_all()?;
        durable::sync_parent(&file)
    });
    synced.await.map_err(failed("write the volume's file"))
}

/// Returns the disk space that a file takes, in bytes.
pub(super) fn disk_bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mib(size: u64) -> VolumeMib {
        VolumeMib::try_from(size).unwrap()
    }

    /// Returns the file system's own record of its size, in MiB, and whether e2fsck finds no
    /// error.
    async fn look(path: &Path) -> (u64, bool) {
        let shown = process::command("dumpe2fs").arg("-h").arg(path).output().await.unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let number = |name: &str| -> u64 {
            let line = shown.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        let checked = process::command("e2fsck").arg("-fn").arg(path).output().await.unwrap();
        ((number("Block count:") * number("Block size:")) >> 20, checked.status.success())
    }

    #[tokio::test]
    async fn empty_volume_takes_little_disk_space_and_can_grow() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) =
            (directory.path().join(super::super::FILE), directory.path().join("copy"));
        make(&path, mib(1024)).await.unwrap();
        assert_eq!(look(&path).await, (1024, true));
        assert!(disk_bytes(&path) < 64 << 20, "{}", disk_bytes(&path));
        assert!(is_clean(&path).unwrap());

        grow(&path, mib(2048)).await.unwrap();
        copy(&path, &other).await.unwrap();

        assert_eq!(look(&path).await, (2048, true));
        assert_eq!(look(&other).await, (2048, true));
        assert!(make(&path, mib(16)).await.is_err(), "the volume exists");
        assert_eq!(look(&path).await, (2048, true), "the volume is unchanged");
    }

    #[tokio::test]
    async fn tool_reaches_its_volume_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("volume"), directory.path().join("other"));
        make(&path, mib(64)).await.unwrap();
        fs::write(&other, "secret").unwrap();
        let locked = hold(&path).await.unwrap();
        let other_name = other.to_str().unwrap();
        let script =
            "id -u; cat $1; echo more >>$1; : <$2 && echo volume; kill -0 $PPID && echo signals";
        let ran = output("sh", &["-c", script, "sh", other_name], &locked).await.unwrap();

        let printed = String::from_utf8(ran.stdout).unwrap();
        if bhatti_host::process::landlock_version() == 0 {
            bhatti_testkit::skip("a tool kept to its volume", "this kernel has no Landlock");
        } else {
            let user = if process::can_use_users() {
                TOOL_USER.to_string()
            } else {
                printed.lines().next().unwrap().to_owned()
            };
            assert_eq!(printed, format!("{user}\nvolume\n"));
        }
        assert_eq!(fs::read_to_string(&other).unwrap(), "secret");
        let root = process::can_use_users();
        assert!(!root || fs::metadata(&path).unwrap().uid() == 0, "the volume is root's again");
    }

    #[tokio::test]
    async fn lock_waits_for_a_tool_of_an_earlier_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(super::super::FILE);
        make(&path, mib(16)).await.unwrap();
        let locked = hold(&path).await.unwrap();
        let lock = Stdio::from(locked.file.try_clone().unwrap());
        let mut tool = process::command("sleep").arg("300").stdin(lock).spawn().unwrap();
        drop(locked);

        let second = tokio::spawn(async move { hold(&path).await.map(drop) });
        timeout(LOCK_LOOK * 4, tool.wait()).await.unwrap_err();
        assert!(!second.is_finished(), "the tool holds the lock");
        tool.kill().await.unwrap();

        second.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn tool_that_only_reads_ends_with_its_caller() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(super::super::FILE);
        make(&path, mib(16)).await.unwrap();
        let locked = hold(&path).await.unwrap();
        let endless =
            run_to_its_end("sh", &["-c", "while :; do :; done"], &locked, IfDropped::Killed);

        timeout(LOCK_LOOK * 4, endless).await.unwrap_err();
        drop(locked);

        // The tool held the lock, too.
        timeout(Duration::from_secs(60), hold(&path)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn file_without_a_file_system_is_damaged_and_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(super::super::FILE);
        fs::write(&path, vec![7; 1 << 20]).unwrap();

        for result in [settle(&path).await, grow(&path, mib(16)).await] {
            let error = result.unwrap_err();
            assert!(matches!(error, VolumeFileError::Damaged { .. }), "{error}");
            assert!(!error.to_string().contains(&*directory.path().to_string_lossy()), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), vec![7; 1 << 20]);
    }
}
