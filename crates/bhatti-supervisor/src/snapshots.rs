//! Snapshots with a name: a sandbox as it was, from which others can be made.

use std::io;
use std::path::PathBuf;

use bhatti_engine::MemoryKind;
use bhatti_store::{SandboxRow, SnapshotInsertError, SnapshotRow, StoreError};
use bhatti_types::{
    Environment, Labels, QuotaExceeded, Report, SandboxId, SandboxName, SandboxSpec, SecretName,
    SnapshotName, UserId,
};
use tracing::{info, warn};

use crate::create::{Beginning, CreateError, New, made_up_name};
use crate::disk_quota::DiskQuotaError;
use crate::driver::{Request, TransitionError};
use crate::identity::random;
use crate::steps::{self, Step};
use crate::volumes::{self, MadeFrom};
use crate::{Supervisor, UseError};

/// How the directories begin of snapshots that are in no row yet.
pub(crate) const SAVING: &str = ".save-";
/// How the directory of a snapshot ends that is being deleted.
pub(crate) const DELETING: &str = ".tmp";

/// What is asked of a sandbox that is made from a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResumeRequest {
    /// Its name; a random one if absent.
    pub name: Option<SandboxName>,
    /// The environment of processes to come.
    pub environment: Environment,
    /// Whether it stays hot.
    pub keep_hot: bool,
    /// Its labels.
    pub labels: Labels,
    /// Its secrets.
    pub secrets: Vec<SecretName>,
}

/// Something could not be done with a snapshot. Everything is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotOpError {
    /// Its owner has no such snapshot.
    #[error("snapshot `{0}` not found")]
    NotFound(String),
    /// Its owner has one of that name.
    #[error("snapshot `{0}` already exists")]
    NameTaken(SnapshotName),
    /// Its owner may have no more.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// There is no such sandbox to save.
    #[error(transparent)]
    Use(#[from] UseError),
    /// The sandbox could not be saved.
    #[error(transparent)]
    Save(#[from] TransitionError),
    /// A sandbox could not be made of it.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its files could not be put in place; the next start of the daemon tries again.
    #[error("failed to put the snapshot's files in place")]
    Place(#[source] io::Error),
    /// Its files could not be removed.
    #[error("failed to remove the snapshot's files")]
    Remove(#[source] io::Error),
}

impl From<SnapshotInsertError> for SnapshotOpError {
    fn from(error: SnapshotInsertError) -> Self {
        match error {
            SnapshotInsertError::NameTaken(name) => Self::NameTaken(name),
            SnapshotInsertError::Quota(quota) => Self::Quota(quota),
            SnapshotInsertError::Store(error) => Self::Store(error),
        }
    }
}

impl From<DiskQuotaError> for SnapshotOpError {
    fn from(error: DiskQuotaError) -> Self {
        match error {
            DiskQuotaError::Quota(quota) => Self::Quota(quota),
            DiskQuotaError::Store(error) => Self::Store(error),
        }
    }
}

impl Supervisor {
    /// Saves a sandbox under a name; it goes on meanwhile.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; nothing of the snapshot is left then.
    ///
    /// # Cancel safety
    ///
    /// A snapshot that has begun is finished.
    pub async fn create_snapshot(
        &self,
        owner: UserId,
        sandbox: &str,
        name: SnapshotName,
    ) -> Result<SnapshotRow, SnapshotOpError> {
        let (supervisor, sandbox) = (self.clone(), sandbox.to_owned());
        let made = tokio::spawn(async move { supervisor.save_as(owner, &sandbox, name).await });
        made.await.map_err(|_| CreateError::Interrupted)?
    }

    async fn save_as(
        &self,
        owner: UserId,
        sandbox: &str,
        name: SnapshotName,
    ) -> Result<SnapshotRow, SnapshotOpError> {
        let shared = &self.shared;
        let row = self.find(owner, sandbox)?;
        shared.store.admit_snapshot(owner, &name)?;
        row.state.admit_use().map_err(UseError::from)?;
        let _disk = shared.admit_save(&row).await?;
        let id = SandboxId::from_entropy(random().map_err(CreateError::Entropy)?);
        // Its own name when it is in its row: see `recover`.
        let directory = shared.config.snapshots_dir.join(format!("{SAVING}{id}"));
        let place = directory.clone();
        let save = |reply| Request::Save {
            directory: place,
            memory: None,
            made_from: MadeFrom::Kept,
            reply,
        };
        let saved = self.handle(row.id, sandbox)?.ask(save).await?;
        steps::reached(Step::Unnamed, shared.config.fault);
        let snapshot = SnapshotRow {
            id,
            owner,
            name,
            sandbox_id: row.id,
            sandbox_name: row.spec.name,
            cpus: row.spec.cpus,
            memory: row.spec.memory,
            disk: row.spec.disk,
            agent_token: row.agent_token,
            is_full: saved.info.memory == MemoryKind::Full,
            memory_bytes: saved.info.memory_bytes,
            image: row.spec.image,
            network: row.spec.network,
            volumes: row.volumes,
            created_at: String::new(),
        };
        match shared.store.insert_snapshot(snapshot) {
            Ok(snapshot) => {
                let place = self.snapshot_directory(id);
                tokio::fs::rename(&directory, place).await.map_err(SnapshotOpError::Place)?;
                info!(snapshot = %snapshot.name, sandbox = %snapshot.sandbox_id, memory_bytes = snapshot.memory_bytes, "Sandbox saved under a name");
                shared.metrics.fork_pause.observe(saved.paused.as_secs_f64());
                let sandbox = Some((snapshot.sandbox_id, snapshot.sandbox_name.to_string()));
                let detail = serde_json::json!({ "snapshot": snapshot.name.as_str() });
                self.record("snapshot.created", owner, sandbox, detail);
                Ok(snapshot)
            }
            Err(error) => {
                if let Err(error) = tokio::fs::remove_dir_all(&directory).await {
                    warn!(path = %directory.display(), %error, "Failed to remove a snapshot that could not be recorded");
                }
                Err(error.into())
            }
        }
    }

    /// The snapshot that `owner` calls so.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotOpError::NotFound`] if there is none.
    pub fn find_snapshot(&self, owner: UserId, name: &str) -> Result<SnapshotRow, SnapshotOpError> {
        let found = self.shared.store.find_snapshot(owner, name)?;
        found.ok_or_else(|| SnapshotOpError::NotFound(name.to_owned()))
    }

    /// The snapshots of `owner`, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_snapshots(&self, owner: UserId) -> Result<Vec<SnapshotRow>, StoreError> {
        self.shared.store.list_snapshots(Some(owner))
    }

    /// Makes a sandbox of a snapshot, which stays.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; nothing of the sandbox is left then.
    pub async fn resume_snapshot(
        &self,
        owner: UserId,
        name: &str,
        request: ResumeRequest,
    ) -> Result<SandboxRow, SnapshotOpError> {
        let snapshot = self.find_snapshot(owner, name)?;
        let spec = SandboxSpec {
            name: request.name.map_or_else(made_up_name, Ok)?,
            cpus: snapshot.cpus,
            memory: snapshot.memory,
            disk: snapshot.disk,
            environment: request.environment,
            keep_hot: request.keep_hot,
            labels: request.labels,
            secrets: request.secrets,
            init: String::new(),
            image: snapshot.image,
            network: snapshot.network,
        };
        let beginning = Beginning::Saved {
            snapshot: self.snapshot_directory(snapshot.id),
            token: snapshot.agent_token,
            origin: format!("snapshot {}", snapshot.id),
        };
        let volumes = volumes::of_fork(&snapshot.volumes, MadeFrom::Kept);
        let new = New::of(&self.shared, owner, spec, volumes).await?;
        let copied = snapshot.volumes.iter().map(|volume| volume.size.bytes()).sum();
        let _disk = self.shared.admit_disk(owner, copied).await?;
        Ok(self.create_from(new, beginning).await?)
    }

    /// Deletes a snapshot. Sandboxes that were made of it keep what they need.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such snapshot or it cannot be removed.
    pub async fn delete_snapshot(&self, owner: UserId, name: &str) -> Result<(), SnapshotOpError> {
        let snapshot = self.find_snapshot(owner, name)?;
        let directory = self.snapshot_directory(snapshot.id);
        // A daemon that finds it under this name puts it back if there is a row of it, and else removes it.
        let gone = directory.with_file_name(format!("{}{DELETING}", snapshot.id));
        match tokio::fs::rename(&directory, &gone).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(SnapshotOpError::Remove(error));
            }
            _ => {}
        }
        if let Err(error) = self.shared.store.delete_snapshot(snapshot.id) {
            if let Err(error) = tokio::fs::rename(&gone, &directory).await {
                warn!(path = %gone.display(), error = %Report(&error), "Failed to put a snapshot back that was not deleted");
            }
            return Err(error.into());
        }
        let detail = serde_json::json!({ "snapshot": snapshot.name.as_str() });
        self.record("snapshot.deleted", owner, None, detail);
        if let Err(error) = tokio::fs::remove_dir_all(&gone).await {
            warn!(path = %gone.display(), error = %Report(&error), "Failed to remove a snapshot's files");
        }
        Ok(())
    }

    fn snapshot_directory(&self, id: SandboxId) -> PathBuf {
        self.shared.config.snapshots_dir.join(id.to_string())
    }
}
