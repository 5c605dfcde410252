//! The part of a task that runs in a jailed process.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use bhatti_host::process::{JailLimits, enter_jail};
use ring::digest::{Context, SHA256};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;

use super::{ARCHIVE, CPU_LIMIT, MEMORY_BYTES_MAX, OWNERS, Outcome, TREE, Task};
use crate::archive::{Bounded, Part, TOO_LARGE};
use crate::layer::{self, LayerError, Owners};

/// Maximum size of one file, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 40;

/// Runs a task in this process, which must have one thread and do nothing else. Prints what
/// became of it. The task ends early if `parent` is no longer the parent of this process.
///
/// # Errors
///
/// Returns an error if an argument is malformed, or if the outcome cannot be printed.
pub fn run_task(task: &str, directory: &Path, parent: &str) -> io::Result<()> {
    let parent = parent.parse().ok().and_then(Pid::from_raw);
    let task: Task = serde_json::from_str(task).map_err(io::Error::other)?;
    // The permissions of files are the archive's.
    rustix::process::umask(Mode::empty());
    let outcome = match perform(task, directory, parent) {
        Ok(outcome) | Err(outcome) => outcome,
    };
    let text = serde_json::to_vec(&outcome).map_err(io::Error::other)?;
    io::stdout().write_all(&text)
}

fn perform(task: Task, directory: &Path, parent: Option<Pid>) -> Result<Outcome, Outcome> {
    // Opened before the jail is closed.
    let input =
        io::stdin().as_fd().try_clone_to_owned().map(File::from).map_err(|error| host(&error))?;
    let limits =
        JailLimits { cpu: CPU_LIMIT, memory_bytes: MEMORY_BYTES_MAX, file_bytes: FILE_BYTES_MAX };
    let directory = enter_jail(directory, limits).map_err(|error| host(&error))?;
    match task {
        Task::Decompress { bytes_max } => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
            let file = rustix::fs::openat(&directory, ARCHIVE, flags, Mode::RUSR);
            let mut file = File::from(file.map_err(|error| host(&error.into()))?);
            let whole = Part::whole(&input).map_err(|error| host(&error))?;
            let content =
                whole.decompressed().map_err(|error| Outcome::Refused(error.to_string()))?;
            let content = Attended { inner: content, parent };
            let mut content = Bounded::new(content, bytes_max);
            copy(&mut content, &mut file, bytes_max)?;
            Ok(Outcome::Decompressed)
        }
        Task::Apply { offset, bytes, limits } => {
            let tree = open_tree(&directory)?;
            let part = Part { file: &input, offset, bytes };
            let content =
                part.decompressed().map_err(|error| Outcome::Refused(error.to_string()))?;
            let content = Attended { inner: content, parent };
            let mut layer = Hashed { inner: content, context: Context::new(&SHA256) };
            let applied = layer::apply(tree, &mut layer, limits, owners(&directory)?)
                .map_err(|error| explain(&error))?;
            Ok(Outcome::Applied { applied, diff_id: hex::encode(layer.context.finish()) })
        }
        Task::Finish { add_workspace } => {
            let owners = owners(&directory)?;
            layer::finish(open_tree(&directory)?, &owners, add_workspace)
                .map(Outcome::Finished)
                .map_err(|error| explain(&error))
        }
    }
}

fn copy(from: &mut impl Read, to: &mut File, limit: u64) -> Result<(), Outcome> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&buffer[..length]).map_err(|error| host(&error))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == TOO_LARGE => {
                let complaint = format!("the archive has more than {limit} bytes of content");
                return Err(Outcome::TooLarge(complaint));
            }
            Err(error) => return Err(Outcome::Refused(format!("it cannot be read: {error}"))),
        }
    }
}

/// Opens the tree, and makes it for the first layer.
fn open_tree(directory: &OwnedFd) -> Result<OwnedFd, Outcome> {
    let failed = |error: Errno| host(&error.into());
    match rustix::fs::mkdirat(directory, TREE, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(failed(error)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, TREE, flags, Mode::empty()).map_err(failed)
}

/// Opens the record of owners if this process is not root.
fn owners(directory: &OwnedFd) -> Result<Owners, Outcome> {
    if rustix::process::geteuid().is_root() {
        return Ok(Owners::Real);
    }
    let flags = OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, OWNERS, flags, Mode::RUSR | Mode::WUSR);
    file.map(|file| Owners::Recorded(file.into())).map_err(|error| host(&error.into()))
}

fn host(error: &io::Error) -> Outcome {
    Outcome::Failed { message: error.to_string(), number: error.raw_os_error() }
}

/// Blames the archive or the host.
fn explain(error: &LayerError) -> Outcome {
    let message = error.to_string();
    match error.cause() {
        LayerError::TooLarge { .. } => Outcome::TooLarge(message),
        LayerError::Host(error) => Outcome::Failed { message, number: error.raw_os_error() },
        _ => Outcome::Refused(message),
    }
}

/// Reads as long as the process that waits for the outcome lives. A death signal would not do: the
/// kernel sends it when the thread ends that started this process, which the daemon's runtime does.
struct Attended<R> {
    inner: R,
    parent: Option<Pid>,
}

impl<R: Read> Read for Attended<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if rustix::process::getppid() != self.parent {
            return Err(io::Error::other("the process that waits for the outcome has ended"));
        }
        self.inner.read(buffer)
    }
}

/// Computes the digest of what is read.
struct Hashed<R> {
    inner: R,
    context: Context,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.context.update(&buffer[..length]);
        Ok(length)
    }
}
