//! The table of named snapshots.

use bhatti_types::{
    CpuCount, DiskMib, ImageConfig, ImageName, MemoryMib, NetworkSpec, QuotaExceeded, SandboxId,
    SandboxName, SnapshotId, SnapshotName, UserId,
};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::desired::images::{config_text, read_config};
use crate::desired::sandboxes::read_disk;
use crate::desired::users::quota_of;
use crate::desired::volumes::{Attachment, attachments_text, parse_attachments};
use crate::{
    RowName, Store, StoreError, changed_one, immediate, network_spec, now, parsed, sound_rows,
    to_json,
};

const COLUMNS: &str = "id, owner, name, sandbox_id, sandbox_name, cpus, memory_mib, agent_token, memory_kind, memory_bytes, created_at, image, network, network_allow, volumes, disk_mib, image_config, kind, step_key";

/// What a snapshot is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// A user named it.
    Named,
    /// It is the cached result of a step of a template, which is found by this key.
    Step(String),
    /// Sandboxes of a template start from it.
    Template,
}

impl SnapshotKind {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Named => "named",
            Self::Step(_) => "step",
            Self::Template => "template",
        }
    }

    fn step_key(&self) -> Option<&str> {
        match self {
            Self::Step(key) => Some(key),
            Self::Named | Self::Template => None,
        }
    }
}

/// A snapshot as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRow {
    /// Id of the snapshot, which names its directory.
    pub id: SnapshotId,
    /// The owner.
    pub owner: UserId,
    /// What it is for.
    pub kind: SnapshotKind,
    /// Name of the snapshot.
    pub name: SnapshotName,
    /// Id of the saved sandbox.
    pub sandbox_id: SandboxId,
    /// Name of the saved sandbox at that time.
    pub sandbox_name: SandboxName,
    /// Number of vCPUs.
    pub cpus: CpuCount,
    /// Size of the memory.
    pub memory: MemoryMib,
    /// Size of the root disk; that of the image if absent.
    pub disk: Option<DiskMib>,
    /// The token that the guest agent in the snapshot expects at the start of every connection.
    pub agent_token: String,
    /// Whether the snapshot is full, rather than a diff.
    pub is_full: bool,
    /// The size of the saved memory pages, in bytes.
    pub memory_bytes: u64,
    /// Image of the sandbox.
    pub image: ImageName,
    /// What the image says about processes.
    pub image_config: ImageConfig,
    /// Network of the sandbox.
    pub network: NetworkSpec,
    /// Volumes of the sandbox.
    pub volumes: Vec<Attachment>,
    /// When the snapshot was taken (RFC 3339); the store sets it.
    pub created_at: String,
}

/// A snapshot could not be added.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotInsertError {
    /// The owner has a snapshot of that name.
    #[error("snapshot `{0}` already exists")]
    NameTaken(SnapshotName),
    /// The owner has the maximum number of snapshots.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Adds a snapshot whose files are in place.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotInsertError::NameTaken`] if the owner has a snapshot of that name, and
    /// [`SnapshotInsertError::Quota`] if the owner has the maximum number of snapshots.
    pub fn insert_snapshot(&self, row: SnapshotRow) -> Result<SnapshotRow, SnapshotInsertError> {
        let row = SnapshotRow { created_at: now(), ..row };
        self.work(|connection| {
            let transaction = immediate(connection)?;
            match row.kind {
                SnapshotKind::Named => check(&transaction, row.owner, &row.name)?,
                SnapshotKind::Step(_) | SnapshotKind::Template => {}
            }
            transaction
                .execute(
                    &format!("INSERT INTO snapshots ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19)"),
                    params![
                        row.id.to_string(),
                        row.owner.to_string(),
                        row.name.as_str(),
                        row.sandbox_id.to_string(),
                        row.sandbox_name.as_str(),
                        row.cpus.get(),
                        row.memory.get(),
                        row.agent_token,
                        if row.is_full { "full" } else { "diff" },
                        row.memory_bytes,
                        row.created_at,
                        row.image.as_str(),
                        row.network.mode.as_str(),
                        to_json(&row.network.allow.to_texts())?,
                        attachments_text(&row.volumes)?,
                        row.disk.map(DiskMib::get),
                        config_text(&row.image_config)?,
                        row.kind.as_str(),
                        row.kind.step_key(),
                    ],
                )
                .map_err(StoreError::from)?;
            transaction.commit().map_err(StoreError::from)?;
            Ok(row)
        })
    }

    /// Checks whether `owner` may have a snapshot of that name, before the work of taking it.
    ///
    /// # Errors
    ///
    /// As [`insert_snapshot`](Self::insert_snapshot).
    pub fn admit_snapshot(
        &self,
        owner: UserId,
        name: &SnapshotName,
    ) -> Result<(), SnapshotInsertError> {
        self.work(|connection| check(connection, owner, name))
    }

    /// Gives a hidden snapshot a name, and makes it one that its user has named. A snapshot that
    /// had the name becomes hidden in its place, and is returned.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such snapshot, or if its owner has the maximum number.
    pub fn name_snapshot(
        &self,
        id: SnapshotId,
        owner: UserId,
        name: &SnapshotName,
    ) -> Result<Option<SnapshotRow>, SnapshotInsertError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let replaced = find_named(&transaction, owner, name.as_str())?;
            let hidden: String = transaction
                .query_row("SELECT name FROM snapshots WHERE id = ?1", [id.to_string()], |row| {
                    row.get(0)
                })
                .map_err(StoreError::from)?;
            let rename = |id: SnapshotId, name: &str, kind: &SnapshotKind| {
                let sql = "UPDATE snapshots SET name = ?2, kind = ?3 WHERE id = ?1";
                let changed =
                    transaction.execute(sql, params![id.to_string(), name, kind.as_str()]);
                changed.map_err(StoreError::from).and_then(changed_one)
            };
            if let Some(replaced) = &replaced {
                // Names are unique, so the two are exchanged in three steps.
                let between = format!("{hidden}.");
                rename(replaced.id, &between, &SnapshotKind::Template)?;
                check(&transaction, owner, name)?;
                rename(id, name.as_str(), &SnapshotKind::Named)?;
                rename(replaced.id, &hidden, &SnapshotKind::Template)?;
            } else {
                check(&transaction, owner, name)?;
                rename(id, name.as_str(), &SnapshotKind::Named)?;
            }
            transaction.commit().map_err(StoreError::from)?;
            Ok(replaced)
        })
    }

    /// Returns the snapshot of `owner` with this name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_snapshot(
        &self,
        owner: UserId,
        name: &str,
    ) -> Result<Option<SnapshotRow>, StoreError> {
        self.work(|connection| find_named(connection, owner, name))
    }

    /// Returns the snapshot with this id.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn get_snapshot(&self, id: SnapshotId) -> Result<Option<SnapshotRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM snapshots WHERE id = ?1"))?;
            query.query_row([id.to_string()], |row| Ok(read(row))).optional()?.transpose()
        })
    }

    /// Returns the cached result of a step.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_step(&self, owner: UserId, key: &str) -> Result<Option<SnapshotRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM snapshots WHERE owner = ?1 AND step_key = ?2"
            ))?;
            let found = query.query_row(params![owner.to_string(), key], |row| Ok(read(row)));
            found.optional()?.transpose()
        })
    }

    /// Returns the ids of all users' snapshots, damaged rows included.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn snapshot_ids(&self) -> Result<Vec<SnapshotId>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached("SELECT id FROM snapshots")?;
            sound_rows(&mut query, [], RowName("snapshot", 0), |row| {
                parsed(row.get::<_, String>(0)?.parse())
            })
        })
    }

    /// Returns the snapshots of `owner`, or of all users, of every kind, newest first. Damaged rows
    /// are logged and skipped.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_snapshots(&self, owner: Option<UserId>) -> Result<Vec<SnapshotRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM snapshots WHERE ?1 IS NULL OR owner = ?1 ORDER BY created_at DESC, id"
            ))?;
            let owner = owner.map(|owner| owner.to_string());
            sound_rows(&mut query, [owner], RowName("snapshot", 0), read)
        })
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such snapshot.
    pub fn delete_snapshot(&self, id: SnapshotId) -> Result<(), StoreError> {
        self.work(|connection| {
            changed_one(
                connection.execute("DELETE FROM snapshots WHERE id = ?1", [id.to_string()])?,
            )
        })
    }
}

fn find_named(
    connection: &Connection,
    owner: UserId,
    name: &str,
) -> Result<Option<SnapshotRow>, StoreError> {
    let mut query = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM snapshots WHERE owner = ?1 AND name = ?2 AND kind = 'named'"
    ))?;
    let found = query.query_row(params![owner.to_string(), name], |row| Ok(read(row)));
    found.optional()?.transpose()
}

fn check(
    connection: &Connection,
    owner: UserId,
    name: &SnapshotName,
) -> Result<(), SnapshotInsertError> {
    let quota = quota_of(connection, owner)?;
    let (used, taken): (u32, bool) = connection
        .prepare_cached(
            "SELECT count(*), coalesce(max(name = ?2), 0) FROM snapshots
             WHERE owner = ?1 AND kind = 'named'",
        )
        .and_then(|mut query| {
            query.query_row(params![owner.to_string(), name.as_str()], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
        })
        .map_err(StoreError::from)?;
    if taken {
        return Err(SnapshotInsertError::NameTaken(name.clone()));
    }
    match quota.snapshots {
        Some(max) if used >= max => Err(QuotaExceeded::Snapshots { used, max }.into()),
        _ => Ok(()),
    }
}

fn read(row: &Row<'_>) -> Result<SnapshotRow, StoreError> {
    let text = |index: usize| row.get::<_, String>(index);
    let number = |index: usize| row.get::<_, u64>(index);
    Ok(SnapshotRow {
        id: parsed(text(0)?.parse())?,
        owner: parsed(text(1)?.parse())?,
        name: parsed(text(2)?.parse())?,
        sandbox_id: parsed(text(3)?.parse())?,
        sandbox_name: parsed(text(4)?.parse())?,
        cpus: parsed(CpuCount::try_from(number(5)?))?,
        memory: parsed(MemoryMib::try_from(number(6)?))?,
        agent_token: text(7)?,
        is_full: text(8)? == "full",
        memory_bytes: number(9)?,
        created_at: text(10)?,
        image: parsed(text(11)?.parse())?,
        network: network_spec(&text(12)?, &text(13)?)?,
        volumes: parse_attachments(&text(14)?)?,
        disk: read_disk(row.get(15)?)?,
        image_config: read_config(
            row.get_ref(16)?.as_str_or_null().map_err(rusqlite::Error::from)?,
        )?,
        kind: match (text(17)?.as_str(), row.get(18)?) {
            ("step", Some(key)) => SnapshotKind::Step(key),
            ("template", _) => SnapshotKind::Template,
            _ => SnapshotKind::Named,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(number: u8) -> SnapshotRow {
        SnapshotRow {
            id: SnapshotId::from_entropy([number; 8]),
            owner: UserId::ADMIN,
            kind: SnapshotKind::Named,
            name: "ready".parse().unwrap(),
            sandbox_id: SandboxId::from_entropy([2; 8]),
            sandbox_name: "dev".parse().unwrap(),
            cpus: CpuCount::ONE,
            memory: MemoryMib::DEFAULT,
            disk: Some(DiskMib::try_from(8192).unwrap()),
            agent_token: "token".to_owned(),
            is_full: true,
            memory_bytes: 4096,
            created_at: String::new(),
            image: "minimal".parse().unwrap(),
            image_config: ImageConfig { user: "app".to_owned(), ..ImageConfig::default() },
            volumes: vec![Attachment {
                name: "data".parse().unwrap(),
                volume: Some(bhatti_types::VolumeId::from_entropy([4; 8])),
                mount: "/data".parse().unwrap(),
                read_only: true,
                size: bhatti_types::VolumeMib::try_from(64).unwrap(),
            }],
            network: NetworkSpec {
                mode: bhatti_types::NetworkMode::Nat,
                allow: bhatti_types::Allowance::parse(&["10.0.0.0/8"]).unwrap(),
            },
        }
    }

    #[test]
    fn snapshot_is_stored_with_every_field_until_it_is_deleted() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let row = row(1);
        let id = row.id;
        let inserted = store.insert_snapshot(row.clone()).unwrap();
        drop(store);

        let store = Store::open(data.path()).unwrap();

        assert_eq!(store.find_snapshot(UserId::ADMIN, "ready").unwrap(), Some(inserted.clone()));
        assert_eq!(store.list_snapshots(None).unwrap(), [inserted]);
        let again = SnapshotRow { id: SnapshotId::from_entropy([3; 8]), ..row };
        assert!(matches!(store.insert_snapshot(again), Err(SnapshotInsertError::NameTaken(_))));
        store.delete_snapshot(id).unwrap();
        assert!(matches!(store.delete_snapshot(id), Err(StoreError::NoSuchRow)));
    }

    #[test]
    fn snapshots_of_templates_are_found_by_key_or_id_alone() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let of = |number, name: &str, kind| SnapshotRow {
            kind,
            name: name.parse().unwrap(),
            ..row(number)
        };
        let step = store.insert_snapshot(of(1, "step", SnapshotKind::Step("k".into()))).unwrap();
        let base = store.insert_snapshot(of(2, "base", SnapshotKind::Template)).unwrap();

        assert_eq!(store.find_step(UserId::ADMIN, "k").unwrap(), Some(step.clone()));
        assert_eq!(store.find_step(UserId::from_entropy([9; 8]), "k").unwrap(), None);
        assert_eq!(store.get_snapshot(base.id).unwrap(), Some(base.clone()));
        for name in ["step", "base"] {
            assert_eq!(store.find_snapshot(UserId::ADMIN, name).unwrap(), None);
        }
        assert_eq!(store.list_snapshots(None).unwrap().len(), 2);
        let again = of(3, "other", SnapshotKind::Step("k".into()));
        store.insert_snapshot(again).unwrap_err();
    }

    #[test]
    fn hidden_snapshot_takes_the_name_of_another() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let hidden = |number, name: &str| {
            let row = SnapshotRow {
                kind: SnapshotKind::Template,
                name: name.parse().unwrap(),
                ..row(number)
            };
            store.insert_snapshot(row).unwrap()
        };
        let old = store.insert_snapshot(row(1)).unwrap();
        let (new, other) = (hidden(2, "built-2"), hidden(3, "built-3"));

        let replaced = store.name_snapshot(new.id, UserId::ADMIN, &old.name).unwrap();

        assert_eq!(replaced, Some(old.clone()));
        let named = store.find_snapshot(UserId::ADMIN, "ready").unwrap().unwrap();
        assert_eq!((named.id, named.kind), (new.id, SnapshotKind::Named));
        let old = store.get_snapshot(old.id).unwrap().unwrap();
        assert_eq!((old.name.as_str(), old.kind), ("built-2", SnapshotKind::Template));
        let free = "free".parse().unwrap();
        assert_eq!(store.name_snapshot(other.id, UserId::ADMIN, &free).unwrap(), None);
        let missing = SnapshotId::from_entropy([9; 8]);
        store.name_snapshot(missing, UserId::ADMIN, &free).unwrap_err();
        assert_eq!(store.find_snapshot(UserId::ADMIN, "free").unwrap().unwrap().id, other.id);
    }

    #[test]
    fn damaged_snapshot_row_is_skipped_but_its_id_is_listed() {
        for damage in ["image = ' '", "cpus = 99", "memory_bytes = -1", "volumes = '[1]'"] {
            let data = tempfile::tempdir().unwrap();
            let store = Store::open(data.path()).unwrap();
            for (number, name) in [(1, "sound"), (2, "damaged")] {
                let row = SnapshotRow { name: name.parse().unwrap(), ..row(number) };
                store.insert_snapshot(row).unwrap();
            }
            let sql = format!("UPDATE snapshots SET {damage} WHERE name = 'damaged'");
            store.connection.lock().execute(&sql, []).unwrap();

            let listed = store.list_snapshots(None).unwrap();

            assert_eq!(listed.len(), 1, "{damage}");
            assert_eq!(store.snapshot_ids().unwrap().len(), 2, "{damage}");
        }
    }
}
