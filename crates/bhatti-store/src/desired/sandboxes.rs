//! The table of sandboxes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use bhatti_types::{
    DiskMib, Environment, Labels, NetworkMode, QuotaExceeded, SandboxId, SandboxName, SandboxSpec,
    SandboxState, TimeLimit, UserId,
};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::desired::images::config_text;
use crate::desired::users::quota_of;
use crate::desired::volumes::{ATTACHED, Attach, AttachError, Attachment, attach_all};
use crate::host::networks::{AddressError, free_address, keep_address};
use crate::{
    RowName, Store, StoreError, from_json, immediate, now, parsed, secrets_text, sound_rows,
    to_json, unless_damaged,
};

mod change;
mod row;

pub use change::{ChangeError, SandboxChange};
pub use row::StoredSandbox;

use row::read;
pub(crate) use row::read_disk;

/// The columns of the table that a creation fills, in the order of `insert`.
const STORED: &str = "id, owner, name, state, fail_reason, cpus, memory_mib, environment, \
     created_at, keep_hot, origin, agent_token, identity, labels, secrets, init, expires_at, \
     stopped_at, image, network, network_allow, disk_mib, image_config, on_timeout, annex";

/// The columns that `row.rs` reads, in its order.
const COLUMNS: &str = "id, owner, name, state, fail_reason, cpus, memory_mib, environment, \
     created_at, keep_hot, origin, agent_token, identity, labels, secrets, init, expires_at, \
     stopped_at, image, network, network_allow, \
     (SELECT address FROM addresses WHERE sandbox_id = sandboxes.id), disk_mib, image_config, \
     on_timeout, annex";

/// A sandbox as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxRow {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// The owner.
    pub owner: UserId,
    /// The requested specification.
    pub spec: SandboxSpec,
    /// State of the sandbox.
    pub state: SandboxState,
    /// When the sandbox was created (RFC 3339).
    pub created_at: String,
    /// Origin of the sandbox: `boot` (with a reason if the user did not ask for a boot), or
    /// `template`, `sandbox` or `snapshot` and an id.
    pub origin: String,
    /// The token that the guest agent expects at the start of every connection; none if empty.
    pub agent_token: String,
    /// The guest's report of applying its identity, in JSON.
    pub identity: Option<String>,
    /// The time limit.
    pub time_limit: TimeLimit,
    /// When the sandbox was stopped (RFC 3339), if it is stopped.
    pub stopped_at: Option<String>,
    /// Address in the owner's network, if the sandbox has a network card.
    pub address: Option<Ipv4Addr>,
    /// Attached volumes, in the requested order.
    pub volumes: Vec<Attachment>,
}

/// A sandbox to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSandbox {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// The owner.
    pub owner: UserId,
    /// The requested specification.
    pub spec: SandboxSpec,
    /// See [`SandboxRow::origin`].
    pub origin: String,
    /// See [`SandboxRow::agent_token`].
    pub agent_token: String,
    /// See [`SandboxRow::time_limit`].
    pub time_limit: TimeLimit,
    /// Volumes to attach.
    pub volumes: Vec<Attach>,
}

/// Selects sandboxes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxFilter {
    /// Only sandboxes with all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Only sandboxes after this one in the list, given by creation time and id.
    pub after: Option<(String, String)>,
    /// The maximum number of sandboxes; all if absent.
    pub limit: Option<u32>,
}

/// A sandbox could not be added.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    /// The owner has a sandbox of that name.
    #[error("sandbox `{0}` already exists")]
    NameTaken(SandboxName),
    /// The sandbox would exceed the owner's quota.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// A volume cannot be attached.
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

impl Store {
    /// Adds a sandbox in the state `creating`, within its owner's quota.
    ///
    /// # Errors
    ///
    /// As [`admit_sandbox`](Self::admit_sandbox).
    pub fn insert_sandbox(&self, new: NewSandbox) -> Result<SandboxRow, InsertError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let row = insert(&transaction, new)?;
            transaction.commit()?;
            Ok(row)
        })
    }

    /// Checks whether all of these sandboxes could be added one after the other, before the work
    /// of making them. Adds none.
    ///
    /// # Errors
    ///
    /// As [`insert_sandbox`](Self::insert_sandbox).
    pub fn admit_sandboxes(&self, wanted: Vec<NewSandbox>) -> Result<(), InsertError> {
        self.work(|connection| {
            // The transaction is rolled back when it is dropped.
            let transaction = immediate(connection)?;
            wanted.into_iter().try_for_each(|new| insert(&transaction, new).map(drop))
        })
    }

    /// Checks whether `owner` may have such a sandbox, before the work of making it.
    ///
    /// # Errors
    ///
    /// Returns [`InsertError::NameTaken`] if `owner` has a sandbox of that name, and
    /// [`InsertError::Quota`] if the sandbox would exceed the quota in number or size.
    pub fn admit_sandbox(&self, owner: UserId, spec: &SandboxSpec) -> Result<(), InsertError> {
        self.work(|connection| admit(connection, owner, spec))
    }

    /// Returns the sandbox of `owner` with this id or name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_sandbox(
        &self,
        owner: UserId,
        id_or_name: &str,
    ) -> Result<Option<SandboxRow>, StoreError> {
        self.work(|connection| {
            find(connection, owner, id_or_name, &format!("{COLUMNS}, {ATTACHED}"), read)
        })
    }

    /// Returns the id of the sandbox of `owner` with this id or name, without the work of reading
    /// the other columns.
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
        self.work(|connection| find(connection, owner, id_or_name, "id", read))
    }

    /// Returns the sandbox with this id.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn get_sandbox(&self, id: SandboxId) -> Result<Option<SandboxRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS}, {ATTACHED} FROM sandboxes WHERE id = ?1"
            ))?;
            query.query_row([id.to_string()], |row| Ok(read(row))).optional()?.transpose()
        })
    }

    /// Returns the name of a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn sandbox_name(&self, id: SandboxId) -> Result<Option<String>, StoreError> {
        self.work(|connection| {
            let mut query =
                connection.prepare_cached("SELECT name FROM sandboxes WHERE id = ?1")?;
            Ok(query.query_row([id.to_string()], |row| row.get(0)).optional()?)
        })
    }

    /// Returns the sandboxes of all users, newest first. Damaged rows are logged and skipped.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_all_sandboxes(&self) -> Result<Vec<SandboxRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS}, {ATTACHED} FROM sandboxes ORDER BY created_at DESC, id"
            ))?;
            let mut rows = query.query([])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                if let Some(row) = unless_damaged(row, RowName("sandbox", 0), read(row))? {
                    found.push(row);
                }
            }
            Ok(found)
        })
    }

    /// Returns the ids of all users' sandboxes, damaged rows included, and whether each is being
    /// destroyed. Rows whose ids are damaged are logged and skipped.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_all_sandbox_ids(&self) -> Result<Vec<(SandboxId, bool)>, StoreError> {
        self.work(|connection| {
            let mut query =
                connection.prepare_cached("SELECT id, state = 'destroyed' FROM sandboxes")?;
            sound_rows(&mut query, [], RowName("sandbox", 0), |row| {
                Ok((parsed(row.get::<_, String>(0)?.parse())?, row.get(1)?))
            })
        })
    }

    /// Returns the ids of all sandboxes of `owner`, damaged rows included. Rows whose ids are
    /// damaged are logged and skipped.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_sandbox_ids(&self, owner: UserId) -> Result<Vec<SandboxId>, StoreError> {
        self.work(|connection| {
            let mut query =
                connection.prepare_cached("SELECT id FROM sandboxes WHERE owner = ?1")?;
            sound_rows(&mut query, [owner.to_string()], RowName("sandbox", 0), |row| {
                parsed(row.get::<_, String>(0)?.parse())
            })
        })
    }

    /// Returns the sandboxes of `owner` that match a filter, newest first, without their guests'
    /// identity reports, which are long.
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

    /// Calls `take` with each sandbox that [`list_sandboxes`](Self::list_sandboxes) would return,
    /// one after the other, so that a thousand sandboxes need not be in memory at once. The store
    /// is locked meanwhile: `take` must not use it.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails, or the error of `take`, which has then seen some of
    /// the sandboxes. If `take` returns that a row is [damaged](StoreError::Damaged), the row is
    /// logged and skipped.
    pub fn each_sandbox(
        &self,
        owner: UserId,
        filter: &SandboxFilter,
        mut take: impl FnMut(StoredSandbox<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let SandboxFilter { labels, after, limit } = filter;
        self.work(|connection| {
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
                unless_damaged(row, RowName("sandbox", 0), take(StoredSandbox::new(row)))?;
            }
            Ok(())
        })
    }

    /// Returns the number of sandboxes that are not being destroyed.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn count_sandboxes(&self) -> Result<u64, StoreError> {
        self.work(|connection| {
            let mut query = connection
                .prepare_cached("SELECT count(*) FROM sandboxes WHERE state <> 'destroyed'")?;
            Ok(query.query_row([], |row| row.get(0))?)
        })
    }

    /// Returns the number of sandboxes and snapshots of all users, without cached steps.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn count_made(&self) -> Result<u64, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT (SELECT count(*) FROM sandboxes) + (SELECT count(*) FROM snapshots WHERE kind <> 'step')",
            )?;
            Ok(query.query_row([], |row| row.get(0))?)
        })
    }
}

pub(crate) const fn state_columns(state: SandboxState) -> (&'static str, Option<&'static str>) {
    let reason = match state {
        SandboxState::Failed(reason) => Some(reason.as_str()),
        SandboxState::Creating
        | SandboxState::Running
        | SandboxState::Stopped
        | SandboxState::Destroyed => None,
    };
    (state.as_str(), reason)
}

/// Returns variables as `NAME=value`, each terminated by NUL: names contain no `=`, and neither
/// names nor values contain NUL.
fn environment_text(environment: &Environment) -> String {
    environment.as_map().iter().map(|(name, value)| format!("{name}={value}\0")).collect()
}

fn parse_labels(text: &str) -> Result<Labels, StoreError> {
    if text == "{}" {
        return Ok(Labels::default());
    }
    parsed(Labels::stored(from_json::<BTreeMap<_, _>>(text)?))
}

/// Inserts a sandbox. See [`Store::admit_sandbox`]. A taken name is reported before an exceeded
/// quota, because the name conflicts at any number of sandboxes.
fn insert(transaction: &Connection, new: NewSandbox) -> Result<SandboxRow, InsertError> {
    let NewSandbox { id, owner, spec, origin, agent_token, time_limit, volumes } = new;
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
        time_limit,
        stopped_at: None,
        address,
        volumes: Vec::new(),
    };
    let (state, reason) = state_columns(row.state);
    let mut insert = transaction.prepare_cached(&format!(
        "INSERT INTO sandboxes ({STORED}, node) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, NULL, ?13, ?14, ?15, ?16, NULL, ?17, ?18, ?19, ?20, ?21, ?22, ?23, (SELECT id FROM node))"
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
        row.time_limit.expires_at,
        row.spec.image.as_str(),
        row.spec.network.mode.as_str(),
        to_json(&row.spec.network.allow.to_texts())?,
        row.spec.disk.map(DiskMib::get),
        config_text(&row.spec.image_config)?,
        row.time_limit.on_timeout.as_str(),
        row.spec.annex,
    ])?;
    drop(insert);
    if let Some(address) = address {
        keep_address(transaction, id, owner, address)?;
    }
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

/// Reads columns of the sandbox of `owner` with this id or name. An id takes precedence over an
/// equal name.
fn find<T>(
    connection: &Connection,
    owner: UserId,
    id_or_name: &str,
    columns: &str,
    read: impl Fn(&Row<'_>) -> Result<T, StoreError>,
) -> Result<Option<T>, StoreError> {
    // Separate queries, because a single query for either key has to sort.
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
