//! The files of named snapshots, and of the sources of forks.
//!
//! ```text
//!  <snapshots>/<id>          a snapshot that is in the store
//!  <snapshots>/.save-<id>    being made: put in place if the store has its row, else removed
//!  <snapshots>/<id>.tmp      being deleted: put back if the store has its row, else removed
//!  <snapshots>/.fork-<n>     a parent's state, for as long as its forks are being made
//! ```

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bhatti_engine::SnapshotInfo;
use bhatti_host::blocking;
use bhatti_types::{SandboxId, SnapshotId};
use tracing::warn;

use crate::boot_source::{BootSource, Prepared};
use crate::driver::steps::{self, Step};
use crate::driver::{Request, SavedSandbox};
use crate::files::remove_or_warn;
use crate::identity::random_token;
use crate::volumes::MadeFrom;
use crate::{Node, UseError};

/// The prefix of the directories from which forks are made.
const FORKING: &str = ".fork-";
/// The prefix of the directories of snapshots that have no row yet.
const SAVING: &str = ".save-";
/// The suffix of the directory of a snapshot that is being deleted.
const DELETING: &str = ".tmp";

/// The state of a parent from which forks are made. [`Node::remove_fork_source`] removes its files.
#[derive(Debug)]
pub struct ForkSource {
    directory: PathBuf,
    parent: SandboxId,
    token: String,
    /// The kind and size of the memory.
    pub info: SnapshotInfo,
    /// How long the parent's processes were stopped.
    pub paused: Duration,
}

impl ForkSource {
    /// Prepares one fork.
    ///
    /// # Errors
    ///
    /// Returns an error if the host gives no random bytes.
    pub fn prepared(&self) -> Result<Prepared, getrandom::Error> {
        Prepared::with_new_id(BootSource::Saved {
            snapshot: self.directory.clone(),
            token: self.token.clone(),
            origin: format!("sandbox {}", self.parent),
        })
    }
}

/// The directory of named snapshots. Calls block on disk for a moment, or use the runtime's threads
/// for that.
#[derive(Clone, Debug)]
pub struct SnapshotFiles {
    directory: PathBuf,
}

impl SnapshotFiles {
    pub(crate) const fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Returns the directory of a snapshot that is in place.
    pub(crate) fn of(&self, id: SnapshotId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn unnamed(&self, id: SnapshotId) -> PathBuf {
        self.directory.join(format!("{SAVING}{id}"))
    }

    fn taken(&self, id: SnapshotId) -> PathBuf {
        self.directory.join(format!("{id}{DELETING}"))
    }

    /// Puts the files of a saved snapshot in place, after its row was inserted.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be renamed. The next daemon does that.
    pub async fn put_in_place(&self, id: SnapshotId) -> io::Result<()> {
        tokio::fs::rename(self.unnamed(id), self.of(id)).await
    }

    /// Removes the files of a saved snapshot that got no row. Failures are logged.
    pub async fn discard_unnamed(&self, id: SnapshotId) {
        remove_or_warn(&self.unnamed(id), "a snapshot").await;
    }

    /// Takes a snapshot's files out of use before its row is deleted. Missing files are no error.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be renamed.
    pub async fn take_away(&self, id: SnapshotId) -> io::Result<()> {
        match tokio::fs::rename(self.of(id), self.taken(id)).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Puts files back that were taken away.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be renamed. The next daemon does that.
    pub async fn put_back(&self, id: SnapshotId) -> io::Result<()> {
        tokio::fs::rename(self.taken(id), self.of(id)).await
    }

    /// Removes files that were taken away. Failures are logged; the next daemon repeats it.
    pub async fn remove_taken(&self, id: SnapshotId) {
        remove_or_warn(&self.taken(id), "a snapshot").await;
    }

    /// Settles the files that an earlier daemon left. `named` are the snapshots that are in the
    /// store.
    pub(crate) async fn settle(&self, named: &HashSet<SnapshotId>) -> io::Result<()> {
        for entry in blocking(|| fs::read_dir(&self.directory))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Err(error) = settle(&entry.path(), &name, named).await {
                warn!(
                    path = %entry.path().display(),
                    %error,
                    "Failed to settle a snapshot; it is left alone"
                );
            }
        }
        Ok(())
    }
}

async fn settle(path: &Path, name: &str, named: &HashSet<SnapshotId>) -> io::Result<()> {
    let saving: Option<SnapshotId> = name.strip_prefix(SAVING).and_then(|id| id.parse().ok());
    match saving {
        Some(id) if named.contains(&id) => {
            tokio::fs::rename(path, path.with_file_name(id.to_string())).await
        }
        Some(_) => tokio::fs::remove_dir_all(path).await,
        None if name.starts_with(FORKING) => tokio::fs::remove_dir_all(path).await,
        None if name.ends_with(DELETING) => {
            match name.trim_end_matches(DELETING).parse::<SnapshotId>() {
                // The row is there: the snapshot was not deleted.
                Ok(id) if named.contains(&id) => {
                    tokio::fs::rename(path, path.with_file_name(id.to_string())).await
                }
                _ => tokio::fs::remove_dir_all(path).await,
            }
        }
        None => {
            if name.parse::<SnapshotId>().is_ok_and(|id| !named.contains(&id)) {
                warn!(
                    path = %path.display(),
                    "Found a snapshot that the store does not know; it is left alone"
                );
            }
            Ok(())
        }
    }
}

impl Node {
    /// Returns the files of named snapshots.
    #[must_use]
    pub fn snapshot_files(&self) -> &SnapshotFiles {
        &self.shared.snapshots
    }

    /// Saves a running sandbox as the snapshot `snapshot`, which has no name yet. The sandbox runs
    /// on.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. No files are left then.
    pub async fn save_snapshot(
        &self,
        sandbox: SandboxId,
        snapshot: SnapshotId,
    ) -> Result<SavedSandbox, UseError> {
        let directory = self.shared.snapshots.unnamed(snapshot);
        let saved = self.save(sandbox, directory, MadeFrom::Kept).await?;
        self.shared.metrics.fork_pause.observe(saved.paused.as_secs_f64());
        steps::reached(Step::Unnamed);
        Ok(saved)
    }

    /// Prepares a sandbox that is created from a snapshot, whose agent requires `token`.
    ///
    /// # Errors
    ///
    /// Returns an error if the host gives no random bytes.
    pub fn prepare_snapshot(
        &self,
        snapshot: SnapshotId,
        token: &str,
    ) -> Result<Prepared, getrandom::Error> {
        Prepared::with_new_id(BootSource::Saved {
            snapshot: self.shared.snapshots.of(snapshot),
            token: token.to_owned(),
            origin: format!("snapshot {snapshot}"),
        })
    }

    /// Saves a running sandbox so that forks can be made from it. The sandbox runs on.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. No files are left then.
    pub async fn save_for_forks(&self, parent: SandboxId) -> Result<ForkSource, UseError> {
        let row = self.shared.store.get_sandbox(parent)?;
        let token = row.ok_or_else(|| UseError::NotFound(parent.to_string()))?.agent_token;
        let name = random_token().map_err(UseError::Entropy)?;
        let directory = self.shared.snapshots.directory.join(format!("{FORKING}{name}"));
        let saved = self.save(parent, directory.clone(), MadeFrom::Running).await?;
        self.shared.metrics.fork_pause.observe(saved.paused.as_secs_f64());
        steps::reached(Step::Frozen);
        Ok(ForkSource { directory, parent, token, info: saved.info, paused: saved.paused })
    }

    /// Removes a fork source. The forks have hard links to the files that they need.
    pub async fn remove_fork_source(&self, source: ForkSource) {
        remove_or_warn(&source.directory, "a snapshot").await;
    }

    async fn save(
        &self,
        sandbox: SandboxId,
        directory: PathBuf,
        made_from: MadeFrom,
    ) -> Result<SavedSandbox, UseError> {
        let save = |reply| Request::Save { directory, memory: None, made_from, reply };
        Ok(self.handle(sandbox)?.ask(save).await?)
    }
}
