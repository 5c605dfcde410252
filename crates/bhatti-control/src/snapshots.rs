//! The catalog of named snapshots: saved sandboxes, from which sandboxes are created.

use std::io;

use bhatti_node::{
    MadeFrom, MemoryKind, SavedSandbox, TransitionError, UseError, random, volumes_of_fork,
};
use bhatti_store::{SandboxRow, SnapshotInsertError, SnapshotRow, StoreError};
use bhatti_types::{
    Environment, Labels, QuotaExceeded, Report, SandboxName, SandboxSpec, SecretName, SnapshotId,
    SnapshotName, UserId,
};
use serde_json::json;
use tracing::{info, warn};

use crate::Control;
use crate::create::{CreateError, generated_name};
use crate::disk_quota::DiskQuotaError;

/// A request to create a sandbox from a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResumeRequest {
    /// The name; generated if absent.
    pub name: Option<SandboxName>,
    /// The environment of processes that start later.
    pub environment: Environment,
    /// Whether the sandbox stays hot while it is unused.
    pub keep_hot: bool,
    /// The labels.
    pub labels: Labels,
    /// The secrets.
    pub secrets: Vec<SecretName>,
}

/// An operation on a snapshot failed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotOpError {
    /// The owner has no such snapshot.
    #[error("snapshot `{0}` not found")]
    NotFound(String),
    /// The owner has a snapshot of that name.
    #[error("snapshot `{0}` already exists")]
    NameTaken(SnapshotName),
    /// The owner's quota of snapshots is used up.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The sandbox to save cannot be used.
    #[error(transparent)]
    Use(#[from] UseError),
    /// The sandbox could not be saved.
    #[error(transparent)]
    Save(#[from] TransitionError),
    /// A sandbox could not be created from the snapshot.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The files could not be renamed to their place. The next daemon does that.
    #[error("failed to put the snapshot's files in place")]
    PutInPlace(#[source] io::Error),
    /// The files could not be removed.
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

impl Control {
    /// Saves a sandbox under a name. The sandbox runs on.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. Nothing of the snapshot is left then.
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
        let (control, sandbox) = (self.clone(), sandbox.to_owned());
        let made = tokio::spawn(async move { control.save_as(owner, &sandbox, name).await });
        made.await.map_err(|_| CreateError::Interrupted)?
    }

    async fn save_as(
        &self,
        owner: UserId,
        sandbox: &str,
        name: SnapshotName,
    ) -> Result<SnapshotRow, SnapshotOpError> {
        let store = &self.inner.store;
        let row = self.find(owner, sandbox)?;
        store.admit_snapshot(owner, &name)?;
        row.state.admit_use().map_err(UseError::from)?;
        let _disk = self.admit_save(&row).await?;
        let id = SnapshotId::from_entropy(random().map_err(CreateError::Entropy)?);
        let files = self.inner.node.snapshot_files();
        let saved = self.inner.node.save_snapshot(row.id, id).await?;
        match store.insert_snapshot(snapshot_row(id, name, row, saved)) {
            Ok(snapshot) => {
                files.put_in_place(id).await.map_err(SnapshotOpError::PutInPlace)?;
                info!(
                    snapshot = %snapshot.name,
                    sandbox = %snapshot.sandbox_id,
                    memory_bytes = snapshot.memory_bytes,
                    "Snapshot created"
                );
                let sandbox = Some((snapshot.sandbox_id, snapshot.sandbox_name.to_string()));
                let detail = json!({ "snapshot": snapshot.name.as_str() });
                self.record("snapshot.created", owner, sandbox, detail);
                Ok(snapshot)
            }
            Err(error) => {
                files.discard_unnamed(id).await;
                Err(error.into())
            }
        }
    }

    /// Returns the snapshot of `owner` with this name.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotOpError::NotFound`] if the owner has no such snapshot.
    pub fn find_snapshot(&self, owner: UserId, name: &str) -> Result<SnapshotRow, SnapshotOpError> {
        let found = self.inner.store.find_snapshot(owner, name)?;
        found.ok_or_else(|| SnapshotOpError::NotFound(name.to_owned()))
    }

    /// Returns the snapshots of `owner`, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_snapshots(&self, owner: UserId) -> Result<Vec<SnapshotRow>, StoreError> {
        self.inner.store.list_snapshots(Some(owner))
    }

    /// Creates a sandbox from a snapshot, which stays.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. Nothing of the sandbox is left then.
    pub async fn resume_snapshot(
        &self,
        owner: UserId,
        name: &str,
        request: ResumeRequest,
    ) -> Result<SandboxRow, SnapshotOpError> {
        let snapshot = self.find_snapshot(owner, name)?;
        let prepared = self.inner.node.prepare_snapshot(snapshot.id, &snapshot.agent_token);
        let spec = SandboxSpec {
            name: request.name.map_or_else(generated_name, Ok)?,
            cpus: snapshot.cpus,
            memory: snapshot.memory,
            disk: snapshot.disk,
            environment: request.environment,
            keep_hot: request.keep_hot,
            labels: request.labels,
            secrets: request.secrets,
            init: String::new(),
            image: snapshot.image,
            image_config: snapshot.image_config,
            network: snapshot.network,
        };
        let volumes = volumes_of_fork(&snapshot.volumes, MadeFrom::Kept);
        let admitted = self.admit(owner, spec, volumes).await?;
        let copied = snapshot.volumes.iter().map(|volume| volume.size.bytes()).sum();
        let _disk = self.admit_disk(owner, copied).await?;
        let prepared = prepared.map_err(CreateError::Entropy)?;
        Ok(self.create_from(admitted, prepared).await?)
    }

    /// Deletes a snapshot. Sandboxes that were created from it keep the files that they need.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has no such snapshot or it cannot be removed. It is then
    /// whole.
    pub async fn delete_snapshot(&self, owner: UserId, name: &str) -> Result<(), SnapshotOpError> {
        let snapshot = self.find_snapshot(owner, name)?;
        let files = self.inner.node.snapshot_files();
        files.take_away(snapshot.id).await.map_err(SnapshotOpError::Remove)?;
        if let Err(error) = self.inner.store.delete_snapshot(snapshot.id) {
            if let Err(error) = files.put_back(snapshot.id).await {
                warn!(
                    snapshot = %snapshot.id,
                    error = %Report(&error),
                    "Failed to put back the files of a snapshot that was not deleted"
                );
            }
            return Err(error.into());
        }
        let detail = json!({ "snapshot": snapshot.name.as_str() });
        self.record("snapshot.deleted", owner, None, detail);
        files.remove_taken(snapshot.id).await;
        Ok(())
    }
}

fn snapshot_row(
    id: SnapshotId,
    name: SnapshotName,
    sandbox: SandboxRow,
    saved: SavedSandbox,
) -> SnapshotRow {
    SnapshotRow {
        id,
        owner: sandbox.owner,
        name,
        sandbox_id: sandbox.id,
        sandbox_name: sandbox.spec.name,
        cpus: sandbox.spec.cpus,
        memory: sandbox.spec.memory,
        disk: sandbox.spec.disk,
        agent_token: sandbox.agent_token,
        is_full: saved.info.memory == MemoryKind::Full,
        memory_bytes: saved.info.memory_bytes,
        image: sandbox.spec.image,
        image_config: sandbox.spec.image_config,
        network: sandbox.spec.network,
        volumes: sandbox.volumes,
        created_at: String::new(),
    }
}
