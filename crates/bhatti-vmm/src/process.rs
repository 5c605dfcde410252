//! The VMM's process: finds it again and ends it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use bhatti_engine::RemoveError;
use bhatti_host::process::Followed;
use bhatti_types::SandboxId;
use tokio::time::timeout;

use crate::record::recorded_process;

/// How long a killed VMM may take to disappear.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Returns the name of a sandbox's VM, which is an argument of its VMM's process.
#[must_use]
pub fn vm_name(id: SandboxId) -> String {
    format!("bhatti-{id}")
}

/// Returns a text that differs between builds of a program, without running it.
#[must_use]
pub fn kind_of_program(program: &Path) -> String {
    fs::metadata(program).map_or_else(
        |_| "unknown".to_owned(),
        |file| format!("{} bytes of {}", file.len(), file.mtime()),
    )
}

/// Finds the VMM process of a VM: the recorded process, whichever engine wrote the record. If the
/// daemon died before it wrote the record, finds the process of `program` that has `argument`.
///
/// # Errors
///
/// Returns [`io::ErrorKind::NotFound`] if there is no such process.
pub(crate) async fn find(directory: &Path, program: &Path, argument: &str) -> io::Result<Followed> {
    let (directory, program) = (directory.to_owned(), program.to_owned());
    let argument = argument.to_owned();
    // The search may have to read every process on the host.
    let found = move || find_now(&directory, &program, &argument);
    tokio::task::spawn_blocking(found).await.map_err(io::Error::other)?
}

fn find_now(directory: &Path, program: &Path, argument: &str) -> io::Result<Followed> {
    // Search even without a directory: an operator may have removed the directory of a running
    // VM.
    match recorded_process(directory).and_then(Followed::adopt) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
            ) =>
        {
            let program = program.file_name().unwrap_or_default().to_string_lossy();
            Followed::find_by_argument(&program, argument)
        }
        recorded => recorded,
    }
}

/// Kills a VMM and waits until it has ended. Returns whether it has ended. Logs an error if not.
pub(crate) async fn end(process: &Followed) -> bool {
    process.kill();
    let ended = timeout(KILL_LIMIT, process.ended()).await.is_ok();
    if !ended {
        let (pid, seconds) = (process.id().pid, KILL_LIMIT.as_secs());
        tracing::error!(pid, seconds, "A virtual machine process did not end after it was killed");
    }
    ended
}

/// Ends the VMM that a search found, if any.
///
/// # Errors
///
/// Returns an error if the search failed, or if the VMM does not end.
pub(crate) async fn kill(found: io::Result<Followed>) -> Result<(), RemoveError> {
    let process = match found {
        Ok(process) => process,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(RemoveError::Process { source }),
    };
    let pid = process.id().pid;
    end(&process).await.then_some(()).ok_or(RemoveError::Unkillable { pid })
}

/// Removes all files of a VM that has ended.
///
/// # Errors
///
/// Returns an error if a file cannot be removed.
pub async fn remove(directory: &Path) -> Result<(), RemoveError> {
    match tokio::fs::remove_dir_all(directory).await {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RemoveError::Files { path: directory.to_owned(), source })
        }
        _ => Ok(()),
    }
}
