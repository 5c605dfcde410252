//! Unpacks layers in jailed processes, one for each step.
//!
//! The daemon starts its own program again with a [`Task`], a directory, the daemon's process id,
//! and the layer as standard input. The process confines itself to that directory before it reads
//! the layer ([`bhatti_host::process::enter_jail`]), and prints an [`Outcome`]. So a fault in a
//! decoder or in the extractor gives an attacker a process that reaches one directory of one image.

mod jailed;

use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bhatti_host::blocking;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use crate::archive::LayerFile;
use crate::layer::{Applied, Limits, TreeSize};

pub use jailed::run_task;

/// The command of `bhatti` that runs a task.
pub const COMMAND: &str = "image-task";

/// The tree under construction, in the directory of a build.
pub(crate) const TREE: &str = "root";
/// The owners of its files if the daemon is not root, in the directory of a build. See `Owners`.
pub(crate) const OWNERS: &str = "owners";
/// The decompressed archive, in the directory of a build.
pub(crate) const ARCHIVE: &str = "archive";

/// Limit of a task's processor time.
const CPU_LIMIT: Duration = Duration::from_mins(10);
/// Limit of a task's time. Slow disks take longer than the processor.
const TIME_LIMIT: Duration = Duration::from_hours(1);
/// Limit of a task's memory, in bytes. The decoder of xz takes the most, 256 MiB.
const MEMORY_BYTES_MAX: u64 = 1 << 30;
/// The signal of a process that exceeds its limit of processor time.
const XCPU: i32 = rustix::process::Signal::XCPU.as_raw();
/// Maximum length of an outcome, in bytes.
const OUTCOME_BYTES_MAX: u64 = 1 << 20;

/// What a jailed process does.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Task {
    /// Decompress standard input to the file [`ARCHIVE`].
    Decompress {
        /// Maximum of bytes to write.
        bytes_max: u64,
    },
    /// Apply the layer in a part of standard input to the tree.
    Apply {
        /// Where the layer begins, in bytes.
        offset: u64,
        /// The layer's length, in bytes.
        bytes: u64,
        limits: Limits,
    },
    /// Complete and measure the tree.
    Finish {
        /// Whether to add the directory for users' work.
        add_workspace: bool,
    },
}

/// What became of a task.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Decompressed,
    Applied {
        applied: Applied,
        /// SHA-256 of the uncompressed layer, in hexadecimal.
        diff_id: String,
    },
    Finished(TreeSize),
    /// The archive is at fault.
    Refused(String),
    /// The content exceeds a limit.
    TooLarge(String),
    /// The host is at fault. The number is the system's, if there is one.
    Failed {
        message: String,
        number: Option<i32>,
    },
}

/// A layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The archive is at fault.
    #[error("{0}")]
    Refused(String),
    /// The content exceeds a limit.
    #[error("{0}")]
    TooLarge(String),
    /// The host could not run a task, or could not write.
    #[error("failed to unpack the archive: {message}")]
    Failed {
        /// What failed.
        message: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl From<Outcome> for UnpackError {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Refused(complaint) => Self::Refused(complaint),
            Outcome::TooLarge(complaint) => Self::TooLarge(complaint),
            Outcome::Failed { message, number } => {
                let source = number
                    .map_or_else(|| io::Error::other(&*message), io::Error::from_raw_os_error);
                Self::Failed { message, source }
            }
            Outcome::Decompressed | Outcome::Applied { .. } | Outcome::Finished(_) => {
                failed(io::Error::other("the task printed another task's outcome"))
            }
        }
    }
}

fn failed(source: io::Error) -> UnpackError {
    UnpackError::Failed { message: source.to_string(), source }
}

/// Starts the tasks of one image.
#[derive(Clone, Debug)]
pub(crate) struct Unpacker {
    program: PathBuf,
    directory: PathBuf,
}

impl Unpacker {
    /// Returns an unpacker that works in `directory`, with `program`, which is `bhatti`.
    pub(crate) fn new(program: &Path, directory: &Path) -> Self {
        Self { program: program.to_owned(), directory: directory.to_owned() }
    }

    /// Decompresses an archive. Returns the result, which is [`ARCHIVE`] in the directory.
    pub(crate) async fn decompress(
        &self,
        archive: &File,
        bytes_max: u64,
    ) -> Result<File, UnpackError> {
        match self.run(Task::Decompress { bytes_max }, Some(archive)).await? {
            Outcome::Decompressed => {
                blocking(|| File::open(self.directory.join(ARCHIVE))).map_err(failed)
            }
            other => Err(other.into()),
        }
    }

    /// Applies a layer to the tree. Returns what it had, and the digest of its uncompressed form.
    pub(crate) async fn apply(
        &self,
        layer: &LayerFile,
        limits: Limits,
    ) -> Result<(Applied, String), UnpackError> {
        let task = Task::Apply { offset: layer.offset, bytes: layer.bytes, limits };
        match self.run(task, Some(&layer.file)).await? {
            Outcome::Applied { applied, diff_id } => Ok((applied, diff_id)),
            other => Err(other.into()),
        }
    }

    /// Completes and measures the tree.
    pub(crate) async fn finish(&self, add_workspace: bool) -> Result<TreeSize, UnpackError> {
        match self.run(Task::Finish { add_workspace }, None).await? {
            Outcome::Finished(size) => Ok(size),
            other => Err(other.into()),
        }
    }

    async fn run(&self, task: Task, input: Option<&File>) -> Result<Outcome, UnpackError> {
        let task = serde_json::to_string(&task).map_err(io::Error::other).map_err(failed)?;
        let mut command = bhatti_host::process::command(&self.program);
        command.arg(COMMAND).arg(&task).arg(&self.directory).arg(std::process::id().to_string());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(input) = input {
            command.stdin(input.try_clone().map_err(failed)?);
        }
        let ran = timeout(TIME_LIMIT, run_to_end(command)).await;
        let ran = ran.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
        let (status, output, errors) = ran.map_err(failed)?;
        if status.signal() == Some(XCPU) {
            return Err(UnpackError::TooLarge(format!(
                "unpacking it takes more than {} seconds of processor time",
                CPU_LIMIT.as_secs()
            )));
        }
        serde_json::from_slice(&output).map_err(|_| {
            let errors = String::from_utf8_lossy(&errors);
            failed(io::Error::other(format!("the task ended with {status}: {}", errors.trim())))
        })
    }
}

type Ran = (std::process::ExitStatus, Vec<u8>, Vec<u8>);

/// Runs a command, and returns its status, output and errors.
async fn run_to_end(mut command: tokio::process::Command) -> io::Result<Ran> {
    let mut child = command.spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    let read_output = async {
        match stdout {
            Some(stdout) => stdout.take(OUTCOME_BYTES_MAX).read_to_end(&mut output).await,
            None => Ok(0),
        }
    };
    let read_errors = async {
        match stderr {
            Some(stderr) => stderr.take(OUTCOME_BYTES_MAX).read_to_end(&mut errors).await,
            None => Ok(0),
        }
    };
    tokio::try_join!(read_output, read_errors)?;
    Ok((child.wait().await?, output, errors))
}
