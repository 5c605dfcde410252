//! The tables of volumes and of their attachments to sandboxes.

use bhatti_types::{MountPath, QuotaExceeded, SandboxId, UserId, VolumeId, VolumeMib, VolumeName};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use crate::desired::users::quota_of;
use crate::{
    RowName, Store, StoreError, changed_one, from_json, immediate, now, parsed, sound_rows, to_json,
};

const COLUMNS: &str = "id, owner, name, size_mib, work, created_at";

/// A volume as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRow {
    /// Id of the volume, which names its directory.
    pub id: VolumeId,
    /// The owner.
    pub owner: UserId,
    /// Name of the volume.
    pub name: VolumeName,
    /// Size of the volume.
    pub size: VolumeMib,
    /// Work in progress, during which the volume cannot be attached.
    pub work: Option<VolumeWork>,
    /// When the volume was created (RFC 3339); the store sets it.
    pub created_at: String,
}

/// Work on a volume, during which it cannot be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeWork {
    /// The volume grows: it is attached to no sandbox.
    Resize,
    /// The volume is copied: no sandbox writes to it.
    Clone,
}

impl VolumeWork {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Resize => "resize",
            Self::Clone => "clone",
        }
    }
}

/// A volume to attach to a new sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// Name of the volume.
    pub name: VolumeName,
    /// Path of the mount point.
    pub mount: MountPath,
    /// Kind of the volume.
    pub kind: AttachKind,
}

/// The kind of volume to attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachKind {
    /// The owner's volume of that name: attached to this sandbox alone, or read-only and shared.
    Named {
        /// Whether the volume is read-only.
        read_only: bool,
    },
    /// A volume of the sandbox's own, which is deleted with the sandbox.
    Own {
        /// Size of the volume.
        size: VolumeMib,
        /// Whether the volume is read-only: a copy of a volume that another sandbox attached
        /// read-only.
        read_only: bool,
    },
}

/// A volume attached to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Name of the volume.
    pub name: VolumeName,
    /// Id of the volume; absent for a volume of the sandbox's own.
    pub volume: Option<VolumeId>,
    /// Path of the mount point.
    pub mount: MountPath,
    /// Whether the volume is read-only.
    pub read_only: bool,
    /// Size of the volume.
    pub size: VolumeMib,
}

/// An attachment in JSON.
#[derive(Serialize, Deserialize)]
struct Text {
    name: String,
    volume: Option<String>,
    mount: String,
    read_only: bool,
    size_mib: u64,
}

/// A volume could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The owner has no volume of that name.
    #[error("volume `{0}` not found")]
    NotFound(VolumeName),
    /// The volume is attached to another sandbox.
    #[error("volume `{name}` is attached to sandbox `{sandbox}`")]
    InUse {
        /// The volume.
        name: VolumeName,
        /// The sandbox.
        sandbox: String,
    },
    /// The volume is being resized or copied.
    #[error("volume `{0}` is being resized or copied")]
    Busy(VolumeName),
    /// The total size of the owner's volumes would exceed the quota.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for AttachError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

/// An operation on a volume failed. The volume is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The owner has a volume of that name.
    #[error("volume `{0}` already exists")]
    NameTaken(VolumeName),
    /// The volume is attached to sandboxes.
    #[error("volume `{name}` is attached to {} ({})", count(sandboxes), sandboxes.join(", "))]
    InUse {
        /// The volume.
        name: VolumeName,
        /// The sandboxes.
        sandboxes: Vec<String>,
    },
    /// The volume is being resized or copied.
    #[error("volume `{0}` is being resized or copied")]
    Busy(VolumeName),
    /// The volume would shrink.
    #[error("volume `{name}` has {} MiB; a volume can only grow", size.get())]
    Shrinks {
        /// The volume.
        name: VolumeName,
        /// Current size of the volume.
        size: VolumeMib,
    },
    /// The total size of the owner's volumes would exceed the quota.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for VolumeError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

fn count(sandboxes: &[String]) -> String {
    match sandboxes.len() {
        1 => "a sandbox".to_owned(),
        number => format!("{number} sandboxes"),
    }
}

impl Store {
    /// Adds a volume whose file is in place.
    ///
    /// # Errors
    ///
    /// As [`admit_volume`](Self::admit_volume).
    pub fn insert_volume(&self, row: VolumeRow) -> Result<VolumeRow, VolumeError> {
        let row = VolumeRow { created_at: now(), ..row };
        self.work(|connection| {
            let transaction = immediate(connection)?;
            admit(&transaction, row.owner, &row.name, row.size)?;
            transaction.execute(
                &format!("INSERT INTO volumes ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, NULL, ?5)"),
                params![
                    row.id.to_string(),
                    row.owner.to_string(),
                    row.name.as_str(),
                    row.size.get(),
                    row.created_at
                ],
            )?;
            transaction.commit()?;
            Ok(row)
        })
    }

    /// Checks whether `owner` may have such a volume, before the work of making it.
    ///
    /// # Errors
    ///
    /// Returns [`VolumeError::NameTaken`] if `owner` has a volume of that name, and
    /// [`VolumeError::Quota`] if the total size would exceed the quota.
    pub fn admit_volume(
        &self,
        owner: UserId,
        name: &VolumeName,
        size: VolumeMib,
    ) -> Result<(), VolumeError> {
        self.work(|connection| admit(connection, owner, name, size))
    }

    /// Checks whether `owner` may attach these volumes to a new sandbox, before the work of
    /// making it.
    ///
    /// # Errors
    ///
    /// Returns why one of them cannot be attached.
    pub fn admit_attach(&self, owner: UserId, wanted: &[Attach]) -> Result<(), AttachError> {
        self.work(|connection| {
            wanted
                .iter()
                .try_for_each(|attach| admit_attach(connection, owner, attach.clone()).map(drop))
        })
    }

    /// Returns the volume of `owner` with this name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_volume(&self, owner: UserId, name: &str) -> Result<Option<VolumeRow>, StoreError> {
        self.work(|connection| find(connection, owner, name))
    }

    /// Returns the ids of all users' volumes, damaged rows included.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn volume_ids(&self) -> Result<Vec<VolumeId>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached("SELECT id FROM volumes")?;
            sound_rows(&mut query, [], RowName("volume", 0), |row| {
                parsed(row.get::<_, String>(0)?.parse())
            })
        })
    }

    /// Returns the volumes of `owner`, or of all users, by name. Damaged rows are logged and
    /// skipped.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_volumes(&self, owner: Option<UserId>) -> Result<Vec<VolumeRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM volumes WHERE ?1 IS NULL OR owner = ?1 ORDER BY name, id"
            ))?;
            let owner = owner.map(|owner| owner.to_string());
            sound_rows(&mut query, [owner], RowName("volume", 0), read)
        })
    }

    /// Returns the names of the sandboxes that a volume is attached to, and whether each is
    /// read-only.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn sandboxes_with_volume(&self, id: VolumeId) -> Result<Vec<(String, bool)>, StoreError> {
        self.work(|connection| users_of(connection, id))
    }

    /// Blocks attaching a volume while work on it is in progress, until
    /// [`end_volume_work`](Self::end_volume_work). Returns the row before the work. If the volume
    /// grows, its new size is recorded now, so that no other volume gets the same quota.
    ///
    /// # Errors
    ///
    /// Returns [`VolumeError::InUse`] if the volume's attachments conflict with the work,
    /// [`VolumeError::Busy`] if other work is in progress, and [`VolumeError::Shrinks`] or
    /// [`VolumeError::Quota`] if the new size is refused.
    pub fn begin_volume_work(
        &self,
        id: VolumeId,
        work: VolumeWork,
        grow_to: Option<VolumeMib>,
    ) -> Result<VolumeRow, VolumeError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let row = get(&transaction, id)?;
            check_unused(&transaction, &row, work == VolumeWork::Clone)?;
            if let Some(size) = grow_to {
                // The recorded size is allowed, so that a failed growth can be tried again.
                let more = size.get().checked_sub(row.size.get());
                let shrinks = || VolumeError::Shrinks { name: row.name.clone(), size: row.size };
                let more = u64::from(more.ok_or_else(shrinks)?);
                check_quota::<VolumeError>(&transaction, row.owner, more)?;
            }
            transaction.execute(
                "UPDATE volumes SET work = ?2, size_mib = ?3 WHERE id = ?1",
                params![id.to_string(), work.as_str(), grow_to.unwrap_or(row.size).get()],
            )?;
            transaction.commit()?;
            Ok(row)
        })
    }

    /// Allows attaching a volume again, and records its current size.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such volume.
    pub fn end_volume_work(&self, id: VolumeId, size: VolumeMib) -> Result<(), StoreError> {
        self.work(|connection| {
            changed_one(connection.execute(
                "UPDATE volumes SET work = NULL, size_mib = ?2 WHERE id = ?1",
                params![id.to_string(), size.get()],
            )?)
        })
    }

    /// Allows attaching the volumes that an earlier daemon was copying. Its interrupted resizes
    /// are still to be finished.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn end_volume_copies(&self) -> Result<(), StoreError> {
        let copied = "UPDATE volumes SET work = NULL WHERE work = ?1";
        self.work(|connection| connection.execute(copied, [VolumeWork::Clone.as_str()]))?;
        Ok(())
    }

    /// Deletes a volume that no sandbox has attached. `remove` deletes the files before the
    /// transaction commits.
    ///
    /// # Errors
    ///
    /// Returns [`VolumeError::InUse`] if a sandbox has it attached.
    pub fn delete_volume<E: From<VolumeError>>(
        &self,
        id: VolumeId,
        remove: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        self.work(|connection| {
            let transaction = immediate(connection).map_err(VolumeError::from)?;
            let row = get(&transaction, id).map_err(VolumeError::from)?;
            check_unused(&transaction, &row, false)?;
            transaction
                .execute("DELETE FROM volumes WHERE id = ?1", [id.to_string()])
                .map_err(VolumeError::from)?;
            remove()?;
            Ok(transaction.commit().map_err(VolumeError::from)?)
        })
    }
}

fn read(row: &Row<'_>) -> Result<VolumeRow, StoreError> {
    let text = |index: usize| row.get::<_, String>(index);
    let work = match row.get::<_, Option<String>>(4)?.as_deref() {
        None => None,
        Some("resize") => Some(VolumeWork::Resize),
        Some("clone") => Some(VolumeWork::Clone),
        Some(other) => return Err(StoreError::Damaged(format!("unknown volume work `{other}`"))),
    };
    Ok(VolumeRow {
        id: parsed(text(0)?.parse())?,
        owner: parsed(text(1)?.parse())?,
        name: parsed(text(2)?.parse())?,
        size: parsed(VolumeMib::try_from(row.get::<_, u64>(3)?))?,
        work,
        created_at: text(5)?,
    })
}

fn find(
    connection: &Connection,
    owner: UserId,
    name: &str,
) -> Result<Option<VolumeRow>, StoreError> {
    let mut query = connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM volumes WHERE owner = ?1 AND name = ?2"))?;
    let found = query.query_row(params![owner.to_string(), name], |row| Ok(read(row)));
    found.optional()?.transpose()
}

fn get(connection: &Connection, id: VolumeId) -> Result<VolumeRow, StoreError> {
    let query = format!("SELECT {COLUMNS} FROM volumes WHERE id = ?1");
    let found = connection.query_row(&query, [id.to_string()], |row| Ok(read(row))).optional()?;
    found.ok_or(StoreError::NoSuchRow)?
}

fn users_of(connection: &Connection, id: VolumeId) -> Result<Vec<(String, bool)>, StoreError> {
    let mut query = connection.prepare_cached(
        "SELECT sandboxes.name, read_only FROM sandbox_volumes JOIN sandboxes ON sandboxes.id = sandbox_id
         WHERE volume_id = ?1 ORDER BY sandboxes.name",
    )?;
    let users = query.query_map([id.to_string()], |row| Ok((row.get(0)?, row.get(1)?)))?;
    users.map(|user| Ok(user?)).collect()
}

fn check_unused(
    connection: &Connection,
    row: &VolumeRow,
    readers_may: bool,
) -> Result<(), VolumeError> {
    let users = users_of(connection, row.id)?;
    if users.iter().any(|(_, read_only)| !(*read_only && readers_may)) {
        let sandboxes = users.into_iter().map(|(name, _)| name).collect();
        return Err(VolumeError::InUse { name: row.name.clone(), sandboxes });
    }
    match row.work {
        Some(_) => Err(VolumeError::Busy(row.name.clone())),
        None => Ok(()),
    }
}

fn admit(
    connection: &Connection,
    owner: UserId,
    name: &VolumeName,
    size: VolumeMib,
) -> Result<(), VolumeError> {
    if find(connection, owner, name.as_str())?.is_some() {
        return Err(VolumeError::NameTaken(name.clone()));
    }
    check_quota(connection, owner, size.get().into())
}

/// Checks whether `owner` may have `asked` MiB more. Volumes of the owner's sandboxes count as
/// well.
fn check_quota<E: From<StoreError> + From<QuotaExceeded>>(
    connection: &Connection,
    owner: UserId,
    asked: u64,
) -> Result<(), E> {
    let Some(max) = quota_of(connection, owner)?.volumes_mib else { return Ok(()) };
    let mut query = connection
        .prepare_cached(
            "SELECT (SELECT coalesce(sum(size_mib), 0) FROM volumes WHERE owner = ?1)
                  + (SELECT coalesce(sum(size_mib), 0) FROM sandbox_volumes JOIN sandboxes ON sandboxes.id = sandbox_id
                     WHERE sandboxes.owner = ?1 AND volume_id IS NULL)",
        )
        .map_err(StoreError::from)?;
    let used: u64 =
        query.query_row([owner.to_string()], |row| row.get(0)).map_err(StoreError::from)?;
    if asked > 0 && used + asked > u64::from(max) {
        return Err(QuotaExceeded::Volumes { used, asked, max }.into());
    }
    Ok(())
}

/// Attaches a new sandbox's volumes.
pub(crate) fn attach_all(
    connection: &Connection,
    sandbox: SandboxId,
    owner: UserId,
    wanted: Vec<Attach>,
) -> Result<Vec<Attachment>, AttachError> {
    let mut attachments = Vec::new();
    for (slot, attach) in wanted.into_iter().enumerate() {
        let attachment = admit_attach(connection, owner, attach)?;
        connection.execute(
            "INSERT INTO sandbox_volumes (sandbox_id, slot, name, volume_id, mount, read_only, size_mib)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                sandbox.to_string(),
                slot,
                attachment.name.as_str(),
                attachment.volume.map(|id| id.to_string()),
                attachment.mount.as_str(),
                attachment.read_only,
                attachment.size.get(),
            ],
        )?;
        attachments.push(attachment);
    }
    Ok(attachments)
}

fn admit_attach(
    connection: &Connection,
    owner: UserId,
    attach: Attach,
) -> Result<Attachment, AttachError> {
    let Attach { name, mount, kind } = attach;
    let read_only = match kind {
        AttachKind::Own { size, read_only } => {
            check_quota::<AttachError>(connection, owner, size.get().into())?;
            return Ok(Attachment { name, volume: None, mount, read_only, size });
        }
        AttachKind::Named { read_only } => read_only,
    };
    let Some(row) = find(connection, owner, name.as_str())? else {
        return Err(AttachError::NotFound(name));
    };
    // A volume is attached to one writer, or to any number of readers.
    let others = users_of(connection, row.id)?;
    if let Some((sandbox, _)) = others.into_iter().find(|(_, reads)| !(*reads && read_only)) {
        return Err(AttachError::InUse { name, sandbox });
    }
    if row.work.is_some() {
        return Err(AttachError::Busy(name));
    }
    Ok(Attachment { name, volume: Some(row.id), mount, read_only, size: row.size })
}

/// The volumes of a sandbox, in slot order, as one column of a query of the table of sandboxes.
pub(crate) const ATTACHED: &str = "iif(EXISTS (SELECT 1 FROM sandbox_volumes WHERE sandbox_id = sandboxes.id),
    (SELECT json_group_array(json_object(
        'name', name, 'volume', volume_id, 'mount', mount, 'read_only', json(iif(read_only, 'true', 'false')), 'size_mib', size_mib))
     FROM (SELECT * FROM sandbox_volumes WHERE sandbox_id = sandboxes.id ORDER BY slot)), '[]')";

/// Parses a column of attachments.
pub(crate) fn parse_attachments(text: &str) -> Result<Vec<Attachment>, StoreError> {
    if text == "[]" {
        return Ok(Vec::new());
    }
    let texts: Vec<Text> = from_json(text)?;
    let attachment = |text: Text| {
        let volume = text.volume.map(|id| parsed(id.parse())).transpose()?;
        Ok(Attachment {
            name: parsed(text.name.parse())?,
            volume,
            mount: parsed(text.mount.parse())?,
            read_only: text.read_only,
            size: parsed(VolumeMib::try_from(text.size_mib))?,
        })
    };
    texts.into_iter().map(attachment).collect()
}

/// Returns attachments as the text of a column.
pub(crate) fn attachments_text(attachments: &[Attachment]) -> Result<String, StoreError> {
    let text = |attachment: &Attachment| Text {
        name: attachment.name.to_string(),
        volume: attachment.volume.map(|id| id.to_string()),
        mount: attachment.mount.to_string(),
        read_only: attachment.read_only,
        size_mib: attachment.size.get().into(),
    };
    to_json(&attachments.iter().map(text).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests;
