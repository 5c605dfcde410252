//! Claims: which node runs a sandbox.
//!
//! A node may write a sandbox's row only with a claim: its id and an epoch. Each new claim has a
//! greater epoch. A node that holds an old claim is *fenced*: its writes change nothing and fail.
//! With one host this happens only to a daemon whose successor has claimed its sandboxes.

use std::collections::HashMap;

use bhatti_types::{NodeId, SandboxId, SandboxState};
use rusqlite::{Connection, OptionalExtension, params};

use crate::desired::sandboxes::state_columns;
use crate::{RowName, Store, StoreError, changed_one, immediate, now, parsed, sound_rows};

/// A node's right to write a sandbox's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// The node that runs it.
    pub node: NodeId,
    /// The number of the claim; from 1.
    pub epoch: u64,
}

impl Store {
    /// Returns the id of this store's node.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// Claims all sandboxes of this store's node anew, in one transaction. Returns their claims;
    /// rows whose ids are damaged are logged and left out. On a full disk the claims stay as they
    /// are: a daemon must start, so that sandboxes can be destroyed.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails. No claim has changed then.
    pub fn claim_sandboxes(&self) -> Result<HashMap<SandboxId, Claim>, StoreError> {
        match self.claim_anew() {
            Err(error) if error.is_full_disk() => {
                tracing::warn!("The disk is full, so the claims of sandboxes are not renewed");
                self.work(|connection| claims_of(connection, self.node))
            }
            claimed => claimed,
        }
    }

    fn claim_anew(&self) -> Result<HashMap<SandboxId, Claim>, StoreError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let node = self.node.to_string();
            transaction
                .execute("UPDATE sandboxes SET epoch = epoch + 1 WHERE node = ?1", [node])?;
            let claims = claims_of(&transaction, self.node)?;
            transaction.commit()?;
            Ok(claims)
        })
    }

    /// Returns the claim that a sandbox has when it is inserted.
    #[must_use]
    pub const fn first_claim(&self, sandbox: SandboxId) -> Claim {
        Claim { sandbox, node: self.node, epoch: 1 }
    }

    /// Returns the current claim of a sandbox.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox or no node runs it.
    pub fn claim(&self, sandbox: SandboxId) -> Result<Claim, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT node, epoch FROM sandboxes WHERE id = ?1 AND node NOT NULL",
            )?;
            let found = query.query_row([sandbox.to_string()], |row| {
                Ok((row.get::<_, String>(0)?, row.get(1)?))
            });
            let (node, epoch) = found.optional()?.ok_or(StoreError::NoSuchRow)?;
            Ok(Claim { sandbox, node: parsed(node.parse())?, epoch })
        })
    }

    /// Stores a sandbox's state.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such sandbox, and [`StoreError::Fenced`] if
    /// another claim has replaced this one.
    pub fn set_sandbox_state(&self, claim: &Claim, state: SandboxState) -> Result<(), StoreError> {
        let (state, reason) = state_columns(state);
        self.work(|connection| {
            let mut update = connection.prepare_cached(
                "UPDATE sandboxes SET state = ?4, fail_reason = ?5,
                     stopped_at = CASE WHEN ?4 = 'stopped' THEN coalesce(stopped_at, ?6) END
                 WHERE id = ?1 AND node = ?2 AND epoch = ?3",
            )?;
            let Claim { sandbox, node, epoch } = claim;
            let (id, node) = (sandbox.to_string(), node.to_string());
            let changed = update.execute(params![id, node, epoch, state, reason, now()])?;
            drop(update);
            changed_by(connection, *sandbox, changed)
        })
    }

    /// Stores the guest's report of applying its identity.
    ///
    /// # Errors
    ///
    /// As [`set_sandbox_state`](Self::set_sandbox_state).
    pub fn set_sandbox_identity(&self, claim: &Claim, report: &str) -> Result<(), StoreError> {
        self.work(|connection| {
            let mut update = connection.prepare_cached(
                "UPDATE sandboxes SET identity = ?4 WHERE id = ?1 AND node = ?2 AND epoch = ?3",
            )?;
            let Claim { sandbox, node, epoch } = claim;
            let (id, node) = (sandbox.to_string(), node.to_string());
            let changed = update.execute(params![id, node, epoch, report])?;
            drop(update);
            changed_by(connection, *sandbox, changed)
        })
    }

    /// Deletes a sandbox's row.
    ///
    /// # Errors
    ///
    /// As [`set_sandbox_state`](Self::set_sandbox_state).
    pub fn delete_sandbox(&self, claim: &Claim) -> Result<(), StoreError> {
        self.work(|connection| {
            let mut delete = connection.prepare_cached(
                "DELETE FROM sandboxes WHERE id = ?1 AND node = ?2 AND epoch = ?3",
            )?;
            let Claim { sandbox, node, epoch } = claim;
            let (id, node) = (sandbox.to_string(), node.to_string());
            let changed = delete.execute(params![id, node, epoch])?;
            drop(delete);
            changed_by(connection, *sandbox, changed)
        })
    }
}

/// Returns the id of this store's node.
pub(crate) fn node_of(connection: &Connection) -> Result<NodeId, StoreError> {
    let mut query = connection.prepare_cached("SELECT id FROM node")?;
    parsed(query.query_row([], |row| row.get::<_, String>(0))?.parse())
}

/// Returns the claims of a node.
fn claims_of(
    connection: &Connection,
    node: NodeId,
) -> Result<HashMap<SandboxId, Claim>, StoreError> {
    let mut query = connection.prepare_cached("SELECT id, epoch FROM sandboxes WHERE node = ?1")?;
    let claims = sound_rows(&mut query, [node.to_string()], RowName("sandbox", 0), |row| {
        let sandbox = parsed(row.get::<_, String>(0)?.parse())?;
        Ok((sandbox, Claim { sandbox, node, epoch: row.get(1)? }))
    })?;
    Ok(claims.into_iter().collect())
}

/// Tells a row that is missing from one that another claim protects.
fn changed_by(
    connection: &Connection,
    sandbox: SandboxId,
    changed: usize,
) -> Result<(), StoreError> {
    let exists = || -> Result<bool, StoreError> {
        let mut query = connection.prepare_cached("SELECT 1 FROM sandboxes WHERE id = ?1")?;
        Ok(query.exists([sandbox.to_string()])?)
    };
    match changed {
        0 if exists()? => Err(StoreError::Fenced(sandbox)),
        changed => changed_one(changed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::sandboxes::tests::new;

    #[test]
    fn old_claim_changes_nothing() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let id = SandboxId::from_entropy([1; 8]);
        store.insert_sandbox(new(id)).unwrap();
        let old = store.claim(id).unwrap();
        assert_eq!((old.node, old.epoch), (store.node(), 1));
        assert_eq!(old, store.first_claim(id));
        store.set_sandbox_state(&old, SandboxState::Running).unwrap();

        let claims = store.claim_sandboxes().unwrap();

        let new = claims[&id];
        assert_eq!(new, Claim { epoch: 2, ..old });
        let is_fenced = |result| matches!(result, Err(StoreError::Fenced(fenced)) if fenced == id);
        assert!(is_fenced(store.set_sandbox_state(&old, SandboxState::Stopped)));
        assert!(is_fenced(store.set_sandbox_identity(&old, "{}")));
        assert!(is_fenced(store.delete_sandbox(&old)));
        let row = store.get_sandbox(id).unwrap().unwrap();
        assert_eq!((row.state, row.identity), (SandboxState::Running, None));

        store.set_sandbox_state(&new, SandboxState::Stopped).unwrap();
        store.delete_sandbox(&new).unwrap();
        assert!(matches!(store.delete_sandbox(&new), Err(StoreError::NoSuchRow)));
    }

    #[test]
    fn claim_of_another_node_changes_nothing() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let id = SandboxId::from_entropy([1; 8]);
        store.insert_sandbox(new(id)).unwrap();
        let own = store.claim(id).unwrap();

        let other = Claim { node: NodeId::from_entropy([9; 8]), ..own };

        let refused = store.set_sandbox_state(&other, SandboxState::Running);
        assert!(matches!(refused, Err(StoreError::Fenced(_))));
    }
}
