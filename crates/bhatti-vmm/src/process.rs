//! The VMM's process: found again, ended.

use std::io;
use std::path::Path;
use std::time::Duration;

use bhatti_engine::RemoveError;
use bhatti_host::process::{Followed, ProcessId};
use tokio::time::timeout;

use crate::record::recorded_process;

/// How long a killed VMM may take to disappear.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The VMM of a VM: the one on record, whichever engine wrote it, or, if the daemon died before it could write the record, the one of `program`
/// that has `argument`.
///
/// # Errors
///
/// Returns [`io::ErrorKind::NotFound`] if there is none.
pub async fn find(directory: &Path, program: &Path, argument: &str) -> io::Result<Followed> {
    let (directory, program) = (directory.to_owned(), program.to_owned());
    let argument = argument.to_owned();
    // It may have to look at every process there is.
    let found = move || find_now(&directory, &program, &argument);
    tokio::task::spawn_blocking(found).await.map_err(io::Error::other)?
}

fn find_now(directory: &Path, program: &Path, argument: &str) -> io::Result<Followed> {
    // Even without a directory there may be a process: an operator may have removed the directory.
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

/// Kills a VMM and waits until it has ended. Returns whether it has: one that stays is reported.
pub async fn end(process: &Followed) -> bool {
    process.kill();
    let ended = timeout(KILL_LIMIT, process.ended()).await.is_ok();
    if !ended {
        let (pid, seconds) = (process.id().pid, KILL_LIMIT.as_secs());
        tracing::error!(pid, seconds, "A killed virtual machine process does not end");
    }
    ended
}

/// Ends a VMM whose handle is gone. One that cannot be found has ended.
pub async fn end_by_id(id: ProcessId) {
    if let Ok(process) = Followed::adopt(id) {
        end(&process).await;
    }
}

/// Ends a VMM that was looked for, if there is one.
///
/// # Errors
///
/// Returns an error if it could not be looked for, or does not end.
pub async fn kill(found: io::Result<Followed>) -> Result<(), RemoveError> {
    let process = match found {
        Ok(process) => process,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(RemoveError::Process { source }),
    };
    let pid = process.id().pid;
    end(&process).await.then_some(()).ok_or(RemoveError::Unkillable { pid })
}

/// Removes everything of a VM that has ended.
///
/// # Errors
///
/// Returns an error if something stays.
pub async fn remove(directory: &Path) -> Result<(), RemoveError> {
    match tokio::fs::remove_dir_all(directory).await {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RemoveError::Files { path: directory.to_owned(), source })
        }
        _ => Ok(()),
    }
}
