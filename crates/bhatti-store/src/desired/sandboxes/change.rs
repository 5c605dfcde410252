//! Changes that users make to a sandbox.

use std::collections::BTreeMap;

use bhatti_types::{InvalidLabel, SandboxId, SandboxName, TimeLimit};
use rusqlite::{OptionalExtension, params};

use super::parse_labels;
use crate::{Store, StoreError, changed_one, immediate, is_taken, to_json};

/// A change of a sandbox's name and labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxChange {
    /// The new name.
    pub name: Option<SandboxName>,
    /// Labels to set, or, without a value, to remove.
    pub labels: BTreeMap<String, Option<String>>,
}

/// A sandbox could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The owner has another sandbox of that name.
    #[error("sandbox `{0}` already exists")]
    NameTaken(SandboxName),
    /// The resulting labels would be invalid.
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
    /// Changes a sandbox's name and labels, all of them or none.
    ///
    /// # Errors
    ///
    /// Returns an error if the new name is taken or a label would be invalid.
    pub fn change_sandbox(&self, id: SandboxId, change: SandboxChange) -> Result<(), ChangeError> {
        let SandboxChange { name, labels } = change;
        self.work(|connection| {
            let transaction = immediate(connection)?;
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
        })
    }

    /// Stores whether a sandbox stays hot.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox.
    pub fn set_sandbox_keep_hot(&self, id: SandboxId, keep_hot: bool) -> Result<(), StoreError> {
        self.work(|connection| {
            let mut update =
                connection.prepare_cached("UPDATE sandboxes SET keep_hot = ?2 WHERE id = ?1")?;
            changed_one(update.execute(params![id.to_string(), keep_hot])?)
        })
    }

    /// Stores what a second API keeps with a sandbox.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox.
    pub fn set_sandbox_annex(&self, id: SandboxId, annex: &str) -> Result<(), StoreError> {
        self.work(|connection| {
            let mut update =
                connection.prepare_cached("UPDATE sandboxes SET annex = ?2 WHERE id = ?1")?;
            changed_one(update.execute(params![id.to_string(), annex])?)
        })
    }

    /// Stores a sandbox's time limit.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox.
    pub fn set_sandbox_time_limit(
        &self,
        id: SandboxId,
        limit: TimeLimit,
    ) -> Result<(), StoreError> {
        let TimeLimit { expires_at, on_timeout } = limit;
        self.work(|connection| {
            let mut update = connection.prepare_cached(
                "UPDATE sandboxes SET expires_at = ?2, on_timeout = ?3 WHERE id = ?1",
            )?;
            changed_one(update.execute(params![id.to_string(), expires_at, on_timeout.as_str()])?)
        })
    }
}
