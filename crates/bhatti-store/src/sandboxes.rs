//! The table of sandboxes.

use std::collections::BTreeMap;

use bhatti_types::{
    CpuCount, Environment, MemoryMib, SandboxId, SandboxName, SandboxSpec, SandboxState, UserId,
};
use rusqlite::{ErrorCode, OptionalExtension, Row, params};

use crate::{Store, StoreError, changed_one, now};

const COLUMNS: &str = "id, owner, name, state, fail_reason, cpus, memory_mib, environment, created_at, keep_hot, origin, agent_token, identity";

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
    /// What it was made from: `boot`, or `template`, `sandbox` or `snapshot` and an id.
    pub origin: String,
    /// What its agent wants every connection to begin with; nothing if empty.
    pub agent_token: String,
    /// What its guest did to become itself, in JSON.
    pub identity: Option<String>,
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
}

/// A sandbox could not be added.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    /// Its owner has one of that name.
    #[error("sandbox `{0}` already exists")]
    NameTaken(SandboxName),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Adds a sandbox in the state `creating`.
    ///
    /// # Errors
    ///
    /// Returns [`InsertError::NameTaken`] if its owner has a sandbox of that name.
    pub fn insert_sandbox(&self, new: NewSandbox) -> Result<SandboxRow, InsertError> {
        let NewSandbox { id, owner, spec, origin, agent_token } = new;
        let row = SandboxRow {
            id,
            owner,
            spec,
            state: SandboxState::Creating,
            created_at: now(),
            origin,
            agent_token,
            identity: None,
        };
        let (state, reason) = state_columns(row.state);
        let inserted = self.connection.lock().execute(
            &format!(
                "INSERT INTO sandboxes ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, NULL)"
            ),
            params![
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
            ],
        );
        match inserted {
            Ok(_) => Ok(row),
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                Err(InsertError::NameTaken(row.spec.name))
            }
            Err(error) => Err(InsertError::Store(error.into())),
        }
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
        let connection = self.connection.lock();
        // An id wins over a name that looks like one.
        let mut query = connection.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM sandboxes WHERE owner = ?1 AND (id = ?2 OR name = ?2) AND state <> 'destroyed'
             ORDER BY id = ?2 DESC LIMIT 1"
        ))?;
        query
            .query_row(params![owner.to_string(), id_or_name], |row| Ok(read(row)))
            .optional()?
            .transpose()
    }

    /// The sandbox of this id.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn get_sandbox(&self, id: SandboxId) -> Result<Option<SandboxRow>, StoreError> {
        let connection = self.connection.lock();
        let mut query =
            connection.prepare_cached(&format!("SELECT {COLUMNS} FROM sandboxes WHERE id = ?1"))?;
        query.query_row([id.to_string()], |row| Ok(read(row))).optional()?.transpose()
    }

    /// The sandboxes of `owner`, or of everybody, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_sandboxes(&self, owner: Option<UserId>) -> Result<Vec<SandboxRow>, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM sandboxes WHERE ?1 IS NULL OR owner = ?1 ORDER BY created_at DESC, id"
        ))?;
        let owner = owner.map(|owner| owner.to_string());
        query.query_map([owner], |row| Ok(read(row)))?.map(|row| row?).collect()
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
        let mut update = connection
            .prepare_cached("UPDATE sandboxes SET state = ?2, fail_reason = ?3 WHERE id = ?1")?;
        changed_one(update.execute(params![id.to_string(), state, reason])?)
    }

    /// Forgets a sandbox.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox.
    pub fn delete_sandbox(&self, id: SandboxId) -> Result<(), StoreError> {
        let connection = self.connection.lock();
        changed_one(connection.execute("DELETE FROM sandboxes WHERE id = ?1", [id.to_string()])?)
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

fn parse_environment(text: &str) -> Result<Environment, StoreError> {
    let variable = |entry: &str| {
        let (name, value) = entry.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    let variables: Option<BTreeMap<_, _>> = text.split_terminator('\0').map(variable).collect();
    let variables =
        variables.ok_or_else(|| StoreError::Damaged("an environment without `=`".to_owned()))?;
    Environment::try_from(variables).map_err(|error| damaged(&error))
}

fn damaged(error: &dyn std::error::Error) -> StoreError {
    StoreError::Damaged(error.to_string())
}

fn read(row: &Row<'_>) -> Result<SandboxRow, StoreError> {
    let text = |index: usize| row.get::<_, String>(index);
    let number = |index: usize| row.get::<_, u64>(index);
    let reason: Option<String> = row.get(4)?;
    let state = match (text(3)?.as_str(), reason) {
        ("creating", None) => SandboxState::Creating,
        ("running", None) => SandboxState::Running,
        ("stopped", None) => SandboxState::Stopped,
        ("destroyed", None) => SandboxState::Destroyed,
        ("failed", Some(reason)) => {
            SandboxState::Failed(reason.parse().map_err(|error| damaged(&error))?)
        }
        (state, _) => return Err(StoreError::Damaged(format!("the state `{state}`"))),
    };
    Ok(SandboxRow {
        id: text(0)?.parse().map_err(|error| damaged(&error))?,
        owner: text(1)?.parse().map_err(|error| damaged(&error))?,
        spec: SandboxSpec {
            name: text(2)?.parse().map_err(|error| damaged(&error))?,
            cpus: CpuCount::try_from(number(5)?).map_err(|error| damaged(&error))?,
            memory: MemoryMib::try_from(number(6)?).map_err(|error| damaged(&error))?,
            environment: parse_environment(&text(7)?)?,
            keep_hot: row.get(9)?,
        },
        state,
        created_at: text(8)?,
        origin: text(10)?,
        agent_token: text(11)?,
        identity: row.get(12)?,
    })
}

#[cfg(test)]
mod tests {
    use bhatti_types::FailReason;

    use super::*;

    fn id(number: u8) -> SandboxId {
        SandboxId::from_entropy([number; 8])
    }

    fn spec(name: &str) -> SandboxSpec {
        let variables = [("A", ""), ("B", "x=y\nz"), ("C", "'\"é")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        SandboxSpec {
            name: name.parse().unwrap(),
            cpus: CpuCount::try_from(2).unwrap(),
            memory: MemoryMib::DEFAULT,
            environment: Environment::try_from(BTreeMap::from(variables)).unwrap(),
            keep_hot: true,
        }
    }

    fn new(id: SandboxId) -> NewSandbox {
        NewSandbox {
            id,
            owner: UserId::ADMIN,
            spec: spec("dev"),
            origin: "template x".to_owned(),
            agent_token: "secret".to_owned(),
        }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        (data, store)
    }

    #[test]
    fn row_survives_with_every_field() {
        let (data, store) = store();
        let inserted = store.insert_sandbox(new(id(1))).unwrap();
        store.set_sandbox_identity(id(1), "{}").unwrap();
        store.set_sandbox_keep_hot(id(1), false).unwrap();
        let identity = Some("{}".to_owned());
        let spec = SandboxSpec { keep_hot: false, ..inserted.spec };
        let expected = SandboxRow { identity, spec, ..inserted };
        drop(store);

        let store = Store::open(data.path()).unwrap();

        assert_eq!(store.find_sandbox(UserId::ADMIN, "dev").unwrap(), Some(expected));
    }

    #[test]
    fn name_is_taken_until_its_sandbox_is_destroyed() {
        let (_data, store) = store();
        store.insert_sandbox(new(id(1))).unwrap();

        let taken = store.insert_sandbox(new(id(2)));
        assert!(matches!(taken, Err(InsertError::NameTaken(_))));

        store.set_sandbox_state(id(1), SandboxState::Destroyed).unwrap();
        store.insert_sandbox(new(id(3))).unwrap();
        assert_eq!(store.count_sandboxes().unwrap(), 1);
    }

    #[test]
    fn sandbox_is_found_by_id_and_name_by_its_owner_alone() {
        let (_data, store) = store();
        let other = store
            .insert_user("other".parse().unwrap(), UserId::from_entropy([9; 8]), &[1; 32])
            .unwrap()
            .id;
        let row = store.insert_sandbox(new(id(1))).unwrap();

        for called in ["dev", &id(1).to_string()] {
            assert_eq!(store.find_sandbox(UserId::ADMIN, called).unwrap().as_ref(), Some(&row));
            assert_eq!(store.find_sandbox(other, called).unwrap(), None);
        }
        assert_eq!(store.list_sandboxes(Some(other)).unwrap(), []);
    }

    #[test]
    fn every_state_survives() {
        let (_data, store) = store();
        store.insert_sandbox(new(id(1))).unwrap();

        for state in [
            SandboxState::Running,
            SandboxState::Stopped,
            SandboxState::Failed(FailReason::VmmExited),
            SandboxState::Destroyed,
        ] {
            store.set_sandbox_state(id(1), state).unwrap();
            assert_eq!(store.list_sandboxes(None).unwrap()[0].state, state);
        }
    }

    #[test]
    fn change_of_a_sandbox_that_is_not_there_is_an_error() {
        let (_data, store) = store();

        let changed = store.set_sandbox_state(id(1), SandboxState::Running);

        assert!(matches!(changed, Err(StoreError::NoSuchRow)));
        assert!(matches!(store.delete_sandbox(id(1)), Err(StoreError::NoSuchRow)));
    }
}
