//! The table of sandboxes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use bhatti_types::{
    DiskMib, Environment, InvalidLabel, Labels, NetworkMode, QuotaExceeded, SandboxId, SandboxName,
    SandboxSpec, SandboxState, UserId,
};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::networks::{AddressError, free_address};
use crate::users::quota_of;
use crate::volumes::{ATTACHED, Attach, AttachError, Attachment, attach_all};
use crate::{
    Called, Store, StoreError, changed_one, from_json, immediate, is_taken, now, parsed,
    secrets_text, sound_rows, to_json, unless_damaged,
};

mod row;

pub use row::StoredSandbox;

use row::read;
pub(crate) use row::read_disk;

/// What `row.rs` reads, in its order.
const COLUMNS: &str = "id, owner, name, state, fail_reason, cpus, memory_mib, environment, created_at, keep_hot, origin, agent_token, \
     identity, labels, secrets, init, expires_at, stopped_at, image, network, network_allow, address, disk_mib";

/// A sandbox as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxRow {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub owner: UserId,
    /// What it was asked to be.
    pub spec: SandboxSpec,
    /// Where it stands.
    pub state: SandboxState,
    /// When it was made (RFC 3339).
    pub created_at: String,
    /// What it was made from: `boot`, and why if nobody asked for that, or `template`, `sandbox` or `snapshot` and an id.
    pub origin: String,
    /// What its agent wants every connection to begin with; nothing if empty.
    pub agent_token: String,
    /// What its guest did to become itself, in JSON.
    pub identity: Option<String>,
    /// When it is destroyed, in seconds since 1970; never if absent.
    pub expires_at: Option<u64>,
    /// When it was stopped (RFC 3339), if it is.
    pub stopped_at: Option<String>,
    /// Its address in its owner's network, if it has a network card.
    pub address: Option<Ipv4Addr>,
    /// Its volumes, in the order asked.
    pub volumes: Vec<Attachment>,
}

/// A sandbox to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSandbox {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub owner: UserId,
    /// What it was asked to be.
    pub spec: SandboxSpec,
    /// See [`SandboxRow::origin`].
    pub origin: String,
    /// See [`SandboxRow::agent_token`].
    pub agent_token: String,
    /// See [`SandboxRow::expires_at`].
    pub expires_at: Option<u64>,
    /// The volumes that it is to have.
    pub volumes: Vec<Attach>,
}

/// Which sandboxes are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxFilter {
    /// Those with all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Those behind this one in the list, by when it was made and its id.
    pub after: Option<(String, String)>,
    /// How many; all if absent.
    pub limit: Option<u32>,
}

/// A change of what a person gave a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxChange {
    /// Another name.
    pub name: Option<SandboxName>,
    /// Labels that it gets, or, without a value, loses.
    pub labels: BTreeMap<String, Option<String>>,
}

/// A sandbox could not be added.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    /// Its owner has one of that name.
    #[error("sandbox `{0}` already exists")]
    NameTaken(SandboxName),
    /// Its owner may have no more, or none so large.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// It cannot have one of its volumes.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<AddressError> for InsertError {
    fn from(error: AddressError) -> Self {
        match error {
            AddressError::Quota(quota) => Self::Quota(quota),
            AddressError::Store(error) => Self::Store(error),
        }
    }
}

impl From<rusqlite::Error> for InsertError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

/// A sandbox could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Its owner has another of that name.
    #[error("sandbox `{0}` already exists")]
    NameTaken(SandboxName),
    /// Its labels would be none.
    #[error(transparent)]
    Label(#[from] InvalidLabel),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for ChangeError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

impl Store {
    /// Adds a sandbox in the state `creating`, within what its owner may have.
    ///
    /// # Errors
    ///
    /// As [`admit_sandbox`](Self::admit_sandbox).
    pub fn insert_sandbox(&self, new: NewSandbox) -> Result<SandboxRow, InsertError> {
        let mut connection = self.connection.lock();
        let transaction = immediate(&mut connection)?;
        let row = insert(&transaction, new)?;
        transaction.commit()?;
        Ok(row)
    }

    /// Whether all of these could be added one after the other, before the work of making them. Nothing is added.
    ///
    /// # Errors
    ///
    /// As [`insert_sandbox`](Self::insert_sandbox).
    pub fn admit_sandboxes(&self, wanted: Vec<NewSandbox>) -> Result<(), InsertError> {
        let mut connection = self.connection.lock();
        // Taken back when it is dropped.
        let transaction = immediate(&mut connection)?;
        wanted.into_iter().try_for_each(|new| insert(&transaction, new).map(drop))
    }

    /// Whether `owner` may have such a sandbox, before the work of making one.
    ///
    /// # Errors
    ///
    /// Returns [`InsertError::NameTaken`] if its owner has a sandbox of that name, [`InsertError::Quota`] if it may have no more, or
    /// none so large.
    pub fn admit_sandbox(&self, owner: UserId, spec: &SandboxSpec) -> Result<(), InsertError> {
        admit(&self.connection.lock(), owner, spec)
    }

    /// The sandbox that `owner` calls by this id or name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_sandbox(
        &self,
        owner: UserId,
        id_or_name: &str,
    ) -> Result<Option<SandboxRow>, StoreError> {
        find(&self.connection.lock(), owner, id_or_name, &format!("{COLUMNS}, {ATTACHED}"), read)
    }

    /// The id of the sandbox that `owner` calls so, without the work of reading the rest.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_sandbox_id(
        &self,
        owner: UserId,
        id_or_name: &str,
    ) -> Result<Option<SandboxId>, StoreError> {
        let read = |row: &Row<'_>| parsed(parsed(row.get_ref(0)?.as_str())?.parse());
        find(&self.connection.lock(), owner, id_or_name, "id", read)
    }

    /// The sandbox of this id.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn get_sandbox(&self, id: SandboxId) -> Result<Option<SandboxRow>, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection.prepare_cached(&format!(
            "SELECT {COLUMNS}, {ATTACHED} FROM sandboxes WHERE id = ?1"
        ))?;
        query.query_row([id.to_string()], |row| Ok(read(row))).optional()?.transpose()
    }

    /// Returns the name of a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn sandbox_name(&self, id: SandboxId) -> Result<Option<String>, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection.prepare_cached("SELECT name FROM sandboxes WHERE id = ?1")?;
        Ok(query.query_row([id.to_string()], |row| row.get(0)).optional()?)
    }

    /// The sandboxes of everybody, newest first. Damaged rows are logged and left out.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_all_sandboxes(&self) -> Result<Vec<SandboxRow>, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection.prepare_cached(&format!(
            "SELECT {COLUMNS}, {ATTACHED} FROM sandboxes ORDER BY created_at DESC, id"
        ))?;
        let mut rows = query.query([])?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            if let Some(row) = unless_damaged(row, Called("sandbox", 0), read(row))? {
                found.push(row);
            }
        }
        Ok(found)
    }

    /// The ids of all users' sandboxes, damaged rows included, and whether each is being destroyed.
    /// Rows whose ids are damaged are logged and left out.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_all_sandbox_ids(&self) -> Result<Vec<(SandboxId, bool)>, StoreError> {
        let connection = self.connection.lock();
        let mut query =
            connection.prepare_cached("SELECT id, state = 'destroyed' FROM sandboxes")?;
        sound_rows(&mut query, [], Called("sandbox", 0), |row| {
            Ok((parsed(row.get::<_, String>(0)?.parse())?, row.get(1)?))
        })
    }

    /// The ids of all sandboxes of `owner`, damaged rows included. Rows whose ids are damaged are
    /// logged and left out.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_sandbox_ids(&self, owner: UserId) -> Result<Vec<SandboxId>, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection.prepare_cached("SELECT id FROM sandboxes WHERE owner = ?1")?;
        sound_rows(&mut query, [owner.to_string()], Called("sandbox", 0), |row| {
            parsed(row.get::<_, String>(0)?.parse())
        })
    }

    /// The sandboxes of `owner` that a filter lets through, newest first, without their guests' reports, which are long.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_sandboxes(
        &self,
        owner: UserId,
        filter: &SandboxFilter,
    ) -> Result<Vec<SandboxRow>, StoreError> {
        let mut rows = Vec::new();
        self.each_sandbox(owner, filter, |row| {
            rows.push(row.read()?);
            Ok(())
        })?;
        Ok(rows)
    }

    /// Gives `take` each of the sandboxes that [`list_sandboxes`](Self::list_sandboxes) has, one after the other, so that a thousand of
    /// them need not be in memory at once. The store is locked meanwhile: `take` must not use it.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails, or that of `take`, which has then had some of them. A row that `take` says is
    /// [damaged](StoreError::Damaged) is logged and left out.
    pub fn each_sandbox(
        &self,
        owner: UserId,
        filter: &SandboxFilter,
        mut take: impl FnMut(StoredSandbox<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let SandboxFilter { labels, after, limit } = filter;
        let connection = self.connection.lock();
        let columns = COLUMNS.replace("identity", "NULL");
        let mut query = connection.prepare_cached(&format!(
            "SELECT {columns}, {ATTACHED} FROM sandboxes WHERE owner = ?1 AND state <> 'destroyed'
               AND (?2 IS NULL OR created_at < ?2 OR (created_at = ?2 AND id > ?3))
               AND (?4 = '{{}}' OR NOT EXISTS (
                   SELECT 1 FROM json_each(?4) AS wanted WHERE NOT EXISTS (
                       SELECT 1 FROM json_each(sandboxes.labels) AS has
                       WHERE has.key = wanted.key AND has.value = wanted.value)))
             ORDER BY created_at DESC, id LIMIT ?5"
        ))?;
        let (created_at, id) = after.as_ref().map(|(at, id)| (at, id)).unzip();
        let limit = limit.map_or(-1, i64::from);
        let parameters = params![owner.to_string(), created_at, id, to_json(labels)?, limit];
        let mut rows = query.query(parameters)?;
        while let Some(row) = rows.next()? {
            unless_damaged(row, Called("sandbox", 0), take(StoredSandbox::new(row)))?;
        }
        Ok(())
    }

    /// Changes what a person gave a sandbox, all of it or nothing.
    ///
    /// # Errors
    ///
    /// Returns what would be wrong with the result.
    pub fn change_sandbox(&self, id: SandboxId, change: SandboxChange) -> Result<(), ChangeError> {
        let SandboxChange { name, labels } = change;
        let mut connection = self.connection.lock();
        let transaction = immediate(&mut connection)?;
        let text: Option<String> = transaction
            .query_row("SELECT labels FROM sandboxes WHERE id = ?1", [id.to_string()], |row| {
                row.get(0)
            })
            .optional()?;
        let before = parse_labels(&text.ok_or(StoreError::NoSuchRow)?)?;
        let after = before.changed(labels)?;
        let changed = transaction.execute(
            "UPDATE sandboxes SET labels = ?2, name = coalesce(?3, name) WHERE id = ?1",
            params![
                id.to_string(),
                to_json(after.as_map())?,
                name.as_ref().map(SandboxName::as_str)
            ],
        );
        match (changed, name) {
            (Ok(changed), _) => changed_one(changed)?,
            (Err(error), Some(name)) if is_taken(&error) => {
                return Err(ChangeError::NameTaken(name));
            }
            (Err(error), _) => return Err(error.into()),
        }
        Ok(transaction.commit()?)
    }

    /// How many sandboxes there are.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn count_sandboxes(&self) -> Result<u64, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection
            .prepare_cached("SELECT count(*) FROM sandboxes WHERE state <> 'destroyed'")?;
        Ok(query.query_row([], |row| row.get(0))?)
    }

    /// How many sandboxes and named snapshots there are, of all owners.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn count_made(&self) -> Result<u64, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection.prepare_cached(
            "SELECT (SELECT count(*) FROM sandboxes) + (SELECT count(*) FROM snapshots)",
        )?;
        Ok(query.query_row([], |row| row.get(0))?)
    }

    /// Writes down what a sandbox's guest did to become itself.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox.
    pub fn set_sandbox_identity(&self, id: SandboxId, report: &str) -> Result<(), StoreError> {
        let connection = self.connection.lock();
        let mut update =
            connection.prepare_cached("UPDATE sandboxes SET identity = ?2 WHERE id = ?1")?;
        changed_one(update.execute(params![id.to_string(), report])?)
    }

    /// Writes down whether a sandbox stays hot.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox.
    pub fn set_sandbox_keep_hot(&self, id: SandboxId, keep_hot: bool) -> Result<(), StoreError> {
        let connection = self.connection.lock();
        let mut update =
            connection.prepare_cached("UPDATE sandboxes SET keep_hot = ?2 WHERE id = ?1")?;
        changed_one(update.execute(params![id.to_string(), keep_hot])?)
    }

    /// Writes down where a sandbox stands.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox.
    pub fn set_sandbox_state(&self, id: SandboxId, state: SandboxState) -> Result<(), StoreError> {
        let (state, reason) = state_columns(state);
        let connection = self.connection.lock();
        let mut update = connection.prepare_cached(
            "UPDATE sandboxes SET state = ?2, fail_reason = ?3, stopped_at = CASE WHEN ?2 = 'stopped' THEN coalesce(stopped_at, ?4) END
             WHERE id = ?1",
        )?;
        changed_one(update.execute(params![id.to_string(), state, reason, now()])?)
    }

    /// Forgets a sandbox.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox.
    pub fn delete_sandbox(&self, id: SandboxId) -> Result<(), StoreError> {
        let connection = self.connection.lock();
        let mut delete = connection.prepare_cached("DELETE FROM sandboxes WHERE id = ?1")?;
        changed_one(delete.execute([id.to_string()])?)
    }
}

const fn state_columns(state: SandboxState) -> (&'static str, Option<&'static str>) {
    let reason = match state {
        SandboxState::Failed(reason) => Some(reason.as_str()),
        SandboxState::Creating
        | SandboxState::Running
        | SandboxState::Stopped
        | SandboxState::Destroyed => None,
    };
    (state.as_str(), reason)
}

/// Variables as `NAME=value`, each ended by NUL: names hold no `=`, neither holds NUL.
fn environment_text(environment: &Environment) -> String {
    environment.as_map().iter().map(|(name, value)| format!("{name}={value}\0")).collect()
}

fn parse_labels(text: &str) -> Result<Labels, StoreError> {
    if text == "{}" {
        return Ok(Labels::default());
    }
    parsed(Labels::try_from(from_json::<BTreeMap<_, _>>(text)?))
}

/// See [`Store::admit_sandbox`]. A name that is taken is said first: it is no matter of how many there are.
fn insert(transaction: &Connection, new: NewSandbox) -> Result<SandboxRow, InsertError> {
    let NewSandbox { id, owner, spec, origin, agent_token, expires_at, volumes } = new;
    admit(transaction, owner, &spec)?;
    let address = match spec.network.mode {
        NetworkMode::None => None,
        NetworkMode::Nat => Some(free_address(transaction, owner)?),
    };
    let mut row = SandboxRow {
        id,
        owner,
        spec,
        state: SandboxState::Creating,
        created_at: now(),
        origin,
        agent_token,
        identity: None,
        expires_at,
        stopped_at: None,
        address,
        volumes: Vec::new(),
    };
    let (state, reason) = state_columns(row.state);
    let mut insert = transaction.prepare_cached(&format!(
        "INSERT INTO sandboxes ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, NULL, ?13, ?14, ?15, ?16, NULL, ?17, ?18, ?19, ?20, ?21)"
    ))?;
    insert.execute(params![
        row.id.to_string(),
        row.owner.to_string(),
        row.spec.name.as_str(),
        state,
        reason,
        row.spec.cpus.get(),
        row.spec.memory.get(),
        environment_text(&row.spec.environment),
        row.created_at,
        row.spec.keep_hot,
        row.origin,
        row.agent_token,
        to_json(row.spec.labels.as_map())?,
        secrets_text(&row.spec.secrets)?,
        row.spec.init,
        row.expires_at,
        row.spec.image.as_str(),
        row.spec.network.mode.as_str(),
        to_json(&row.spec.network.allow.to_texts())?,
        row.address.map(|address| address.to_string()),
        row.spec.disk.map(DiskMib::get),
    ])?;
    drop(insert);
    row.volumes = attach_all(transaction, id, owner, volumes)?;
    Ok(row)
}

fn admit(connection: &Connection, owner: UserId, spec: &SandboxSpec) -> Result<(), InsertError> {
    let quota = quota_of(connection, owner)?;
    let mut query = connection.prepare_cached(
        "SELECT count(*), coalesce(max(name = ?2), 0) FROM sandboxes WHERE owner = ?1 AND state <> 'destroyed'",
    )?;
    let parameters = params![owner.to_string(), spec.name.as_str()];
    let (used, taken): (u32, bool) =
        query.query_row(parameters, |row| Ok((row.get(0)?, row.get(1)?)))?;
    if taken {
        return Err(InsertError::NameTaken(spec.name.clone()));
    }
    if let Some(max) = quota.cpus_per_sandbox.filter(|max| u32::from(spec.cpus.get()) > *max) {
        return Err(QuotaExceeded::Cpus { max }.into());
    }
    if let Some(max) = quota.memory_mib_per_sandbox.filter(|max| spec.memory.get() > *max) {
        return Err(QuotaExceeded::Memory { max }.into());
    }
    if let (Some(disk), Some(max)) = (spec.disk, quota.disk_mib)
        && disk.get() > max
    {
        return Err(QuotaExceeded::DiskSize { disk, max }.into());
    }
    match quota.sandboxes {
        Some(max) if used >= max => Err(QuotaExceeded::Sandboxes { used, max }.into()),
        _ => Ok(()),
    }
}

/// Columns of the sandbox that `owner` calls so. An id wins over a name that looks like one.
fn find<T>(
    connection: &Connection,
    owner: UserId,
    id_or_name: &str,
    columns: &str,
    read: impl Fn(&Row<'_>) -> Result<T, StoreError>,
) -> Result<Option<T>, StoreError> {
    // One by one: a query for either has to sort.
    let is_id = id_or_name.parse::<SandboxId>().is_ok();
    for key in if is_id { &["id", "name"][..] } else { &["name"] } {
        let mut query = connection.prepare_cached(&format!(
            "SELECT {columns} FROM sandboxes WHERE owner = ?1 AND {key} = ?2 AND state <> 'destroyed'"
        ))?;
        let found = query.query_row(params![owner.to_string(), id_or_name], |row| Ok(read(row)));
        if let Some(found) = found.optional()? {
            return found.map(Some);
        }
    }
    Ok(None)
}

#[cfg(test)]
pub(crate) mod tests;
