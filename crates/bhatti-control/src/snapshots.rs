//! The catalog of named snapshots: saved sandboxes, from which sandboxes are created.

use std::io;

use bhatti_node::{
    MadeFrom, MemoryKind, SavedSandbox, TransitionError, UseError, random, volumes_of_fork,
};
use bhatti_store::{SandboxRow, SnapshotInsertError, SnapshotKind, SnapshotRow, StoreError};
use bhatti_types::{
    Environment, Labels, QuotaExceeded, Report, SandboxName, SandboxSpec, SecretName, SnapshotId,
    SnapshotName, UserId,
};
use serde_json::json;
use tracing::{info, warn};

use crate::Control;
use crate::create::{
    Admitted, CreateError, SandboxRequest, generated_name, guest_files, time_limit,
};
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
        let made = tokio::spawn(async move {
            control.inner.store.admit_snapshot(owner, &name)?;
            let row = control.find(owner, &sandbox)?;
            let snapshot = control.save_as(row, name, SnapshotKind::Named).await?;
            let sandbox = Some((snapshot.sandbox_id, snapshot.sandbox_name.to_string()));
            let detail = json!({ "snapshot": snapshot.name.as_str() });
            control.record("snapshot.created", owner, sandbox, detail);
            Ok(snapshot)
        });
        made.await.map_err(|_| CreateError::Interrupted)?
    }

    /// Saves a sandbox under a name, in place of the snapshot of that name. That one stays until
    /// the new one is complete.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. The snapshot of that name is then as before.
    ///
    /// # Cancel safety
    ///
    /// A snapshot that has begun is finished.
    pub async fn replace_snapshot(
        &self,
        owner: UserId,
        sandbox: &str,
        name: SnapshotName,
    ) -> Result<SnapshotRow, SnapshotOpError> {
        if self.inner.store.find_snapshot(owner, name.as_str())?.is_none() {
            return self.create_snapshot(owner, sandbox, name).await;
        }
        let (control, sandbox) = (self.clone(), sandbox.to_owned());
        let made = tokio::spawn(async move {
            let row = control.find(owner, &sandbox)?;
            let snapshot = control.save_hidden(row, SnapshotKind::Template).await?;
            let replaced = match control.inner.store.name_snapshot(snapshot.id, owner, &name) {
                Ok(replaced) => replaced,
                Err(error) => {
                    control.forget_snapshot(&snapshot).await;
                    return Err(error.into());
                }
            };
            if let Some(replaced) = replaced {
                control.forget_snapshot(&replaced).await;
            }
            let sandbox = Some((snapshot.sandbox_id, snapshot.sandbox_name.to_string()));
            let detail = json!({ "snapshot": name.as_str() });
            control.record("snapshot.created", owner, sandbox, detail);
            Ok(SnapshotRow { name, kind: SnapshotKind::Named, ..snapshot })
        });
        made.await.map_err(|_| CreateError::Interrupted)?
    }

    /// Saves a sandbox as a snapshot that its user does not see.
    pub(crate) async fn save_hidden(
        &self,
        row: SandboxRow,
        kind: SnapshotKind,
    ) -> Result<SnapshotRow, SnapshotOpError> {
        let number = random().map(u64::from_be_bytes).map_err(CreateError::Entropy)?;
        let name = format!("built-{number:016x}");
        let name = name.parse().map_err(CreateError::Name)?;
        self.save_as(row, name, kind).await
    }

    /// Saves a sandbox. The snapshot gets what `row` says about the sandbox.
    pub(crate) async fn save_as(
        &self,
        row: SandboxRow,
        name: SnapshotName,
        kind: SnapshotKind,
    ) -> Result<SnapshotRow, SnapshotOpError> {
        let store = &self.inner.store;
        row.state.admit_use().map_err(UseError::from)?;
        let _disk = self.admit_save(&row).await?;
        let id = SnapshotId::from_entropy(random().map_err(CreateError::Entropy)?);
        let files = self.inner.node.snapshot_files();
        let saved = self.inner.node.save_snapshot(row.id, id).await?;
        match store.insert_snapshot(snapshot_row(id, (name, kind), row, saved)) {
            Ok(snapshot) => {
                files.put_in_place(id).await.map_err(SnapshotOpError::PutInPlace)?;
                info!(
                    snapshot = %snapshot.name,
                    sandbox = %snapshot.sandbox_id,
                    memory_bytes = snapshot.memory_bytes,
                    "Snapshot created"
                );
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
        let mut snapshots = self.inner.store.list_snapshots(Some(owner))?;
        snapshots.retain(|snapshot| snapshot.kind == SnapshotKind::Named);
        Ok(snapshots)
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
        let ResumeRequest { name, environment, keep_hot, labels, secrets } = request;
        let request = SandboxRequest {
            name,
            environment,
            keep_hot,
            labels,
            secrets,
            ..SandboxRequest::default()
        };
        Ok(self.create_from_snapshot(owner, snapshot, request).await?)
    }

    /// Creates a sandbox from a snapshot of any kind. What the snapshot fixes cannot be requested
    /// otherwise.
    pub(crate) async fn create_from_snapshot(
        &self,
        owner: UserId,
        snapshot: SnapshotRow,
        request: SandboxRequest,
    ) -> Result<SandboxRow, CreateError> {
        check_fixed(&snapshot, &request)?;
        let prepared = self.inner.node.prepare_snapshot(snapshot.id, &snapshot.agent_token);
        let mut network = snapshot.network;
        if !request.allow.ranges().is_empty() {
            network.allow = request.allow;
        }
        let spec = SandboxSpec {
            name: request.name.map_or_else(generated_name, Ok)?,
            cpus: snapshot.cpus,
            memory: snapshot.memory,
            disk: snapshot.disk,
            environment: request.environment,
            keep_hot: request.keep_hot,
            labels: request.labels,
            secrets: request.secrets,
            init: request.init,
            image: snapshot.image,
            image_config: snapshot.image_config,
            network,
            annex: request.annex,
        };
        let files = guest_files(request.files)?;
        let volumes = volumes_of_fork(&snapshot.volumes, MadeFrom::Kept);
        let admitted = self.admit(owner, spec, volumes).await?;
        let time_limit = time_limit(request.lifetime, request.on_timeout);
        let admitted = Admitted { files, time_limit, ..admitted };
        let copied = snapshot.volumes.iter().map(|volume| volume.size.bytes()).sum();
        let _disk = self.admit_disk(owner, copied).await?;
        self.create_from(admitted, prepared?).await
    }

    /// Deletes a snapshot. Sandboxes that were created from it keep the files that they need.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has no such snapshot or it cannot be removed. It is then
    /// whole.
    pub async fn delete_snapshot(&self, owner: UserId, name: &str) -> Result<(), SnapshotOpError> {
        let snapshot = self.find_snapshot(owner, name)?;
        self.remove_snapshot(&snapshot).await?;
        let detail = json!({ "snapshot": snapshot.name.as_str() });
        self.record("snapshot.deleted", owner, None, detail);
        Ok(())
    }

    /// Deletes a snapshot of any kind.
    pub(crate) async fn remove_snapshot(
        &self,
        snapshot: &SnapshotRow,
    ) -> Result<(), SnapshotOpError> {
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
        files.remove_taken(snapshot.id).await;
        Ok(())
    }
}

/// Refuses what a sandbox from this snapshot cannot have.
fn check_fixed(snapshot: &SnapshotRow, request: &SandboxRequest) -> Result<(), CreateError> {
    let differs =
        |what, is_other: bool| if is_other { Err(CreateError::Fixed(what)) } else { Ok(()) };
    differs("cpus", request.cpus.is_some_and(|cpus| cpus != snapshot.cpus))?;
    differs("memory", request.memory.is_some_and(|memory| memory != snapshot.memory))?;
    differs("disk", request.disk.is_some() && request.disk != snapshot.disk)?;
    differs("image", request.image.as_ref().is_some_and(|image| *image != snapshot.image))?;
    differs("network", request.network.is_some_and(|mode| mode != snapshot.network.mode))?;
    differs("volumes", !request.volumes.is_empty())?;
    differs("start command", request.start)?;
    differs("cold boot", request.cold_boot)
}

fn snapshot_row(
    id: SnapshotId,
    (name, kind): (SnapshotName, SnapshotKind),
    sandbox: SandboxRow,
    saved: SavedSandbox,
) -> SnapshotRow {
    SnapshotRow {
        id,
        owner: sandbox.owner,
        kind,
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
