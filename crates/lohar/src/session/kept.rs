//! Jobs that start again each time that the guest boots anew.
//!
//! Each job has a file `restart/<id>.json` in the agent's own directory, which only root can
//! read: the request that started the job. The file is on the disk before the agent reports the
//! job to the host, and is removed when the job has ended. A shutdown of the guest does not count
//! as the end of a job.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bhatti_proto::{ErrorKind, ExecRequest};

use super::create::start_again;
use crate::Agent;
use crate::file::begin_as_agent;
use crate::log;
use crate::refusal::{OpError, kind_of, refused};

/// The most jobs that start again.
pub(super) const KEPT_MAX: usize = 64;

/// The largest file, in bytes: a request is at most one frame.
const FILE_BYTES_MAX: u64 = 2 << 20;

const ENDING: &str = "json";

fn directory(agent: &Agent) -> PathBuf {
    agent.state_dir.join("restart")
}

fn file(agent: &Agent, id: &str) -> PathBuf {
    directory(agent).join(format!("{id}.{ENDING}"))
}

/// Keeps a request under the id of its job.
///
/// # Errors
///
/// Refused if the request cannot be written, or if [`KEPT_MAX`] requests are kept already.
pub(super) async fn keep(agent: &Agent, id: &str, request: &ExecRequest) -> Result<(), OpError> {
    let path = file(agent, id);
    let text = serde_json::to_vec(request).map_err(io::Error::from);
    let failed =
        |error: io::Error| refused(kind_of(&error), format!("start: keep the job: {error}"));
    let keeping = begin_as_agent(agent, move || {
        let text = text.map_err(failed)?;
        if count(&path) >= KEPT_MAX {
            let message = format!("{KEPT_MAX} jobs start again already, which is the limit");
            return Err(refused(ErrorKind::Limit, message));
        }
        write(&path, &text).map_err(|error| {
            // A file that was not written whole must not start a job at the next boot.
            drop((fs::remove_file(&path), fs::remove_file(unfinished(&path))));
            failed(error)
        })
    });
    keeping.await?.end().await
}

/// Removes the request of a job. A failure is reported on the console.
pub(super) async fn forget(agent: &Agent, id: &str) {
    let path = file(agent, id);
    let shown = path.display().to_string();
    let forgetting = async {
        let mut forgetting = begin_as_agent(agent, move || Ok(remove(&path))).await?;
        forgetting.end().await
    };
    let failed = match forgetting.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(OpError::Refused(error)) => error.message,
        Err(OpError::HostGone) => return,
    };
    log::line(format_args!("failed to remove {shown}: {failed}"));
}

/// Starts all kept jobs, the oldest first, under the ids that they had.
pub(crate) async fn start_kept(agent: &Rc<Agent>) {
    let directory = directory(agent);
    let reading = async {
        let mut reading = begin_as_agent(agent, move || Ok(read_all(&directory))).await?;
        reading.end().await
    };
    for (number, request) in reading.await.unwrap_or_default() {
        if let Err(error) = start_again(agent, number, &request) {
            log::line(format_args!("failed to start the job s{number} again: {}", error.message));
        }
    }
}

fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let unfinished = unfinished(path);
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&unfinished)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    // The directory and its parent may be new.
    for directory in directory.ancestors().take(2) {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

/// The name of a file before all of it is on the disk.
fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Returns the number of requests that are kept beside `path`.
fn count(path: &Path) -> usize {
    let entries = path.parent().and_then(|directory| fs::read_dir(directory).ok());
    let is_kept = |entry: &fs::DirEntry| entry.path().extension().is_some_and(|it| it == ENDING);
    entries.into_iter().flatten().flatten().filter(is_kept).count()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        removed => removed?,
    }
    File::open(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?.sync_all()
}

/// Returns the requests, with the numbers of their sessions. A file without a valid request is
/// reported on the console; an unfinished file is removed.
fn read_all(directory: &Path) -> Vec<(u64, ExecRequest)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found = Vec::new();
    for entry in entries.take(2 * KEPT_MAX) {
        let path = entry.path();
        if path.extension().is_none_or(|ending| ending != ENDING) {
            // The host was not told that this job is kept.
            drop(fs::remove_file(&path));
            continue;
        }
        match read(&path) {
            Ok(kept) => found.push(kept),
            Err(error) => log::line(format_args!("failed to read {}: {error}", path.display())),
        }
    }
    found.sort_by_key(|(number, _)| *number);
    found
}

fn read(path: &Path) -> io::Result<(u64, ExecRequest)> {
    let number = path.file_stem().and_then(|stem| stem.to_str()?.strip_prefix('s')?.parse().ok());
    let number = number.ok_or(io::ErrorKind::InvalidFilename)?;
    let mut text = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut text)?;
    Ok((number, serde_json::from_slice(&text)?))
}
