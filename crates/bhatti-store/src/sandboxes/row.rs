//! What a row of the table of sandboxes holds.

use std::collections::BTreeMap;

use bhatti_types::{
    CpuCount, DiskMib, Environment, MemoryMib, SandboxId, SandboxSpec, SandboxState,
};
use rusqlite::Row;
use rusqlite::types::ValueRef;

use super::{SandboxRow, parse_labels};
use crate::volumes::parse_attachments;
use crate::{StoreError, network_spec, parse_secrets, parsed};

/// Where some of the columns are.
const ID: usize = 0;
const STATE: usize = 3;
const CREATED_AT: usize = 8;

/// A sandbox in a list, as its row holds it.
pub struct StoredSandbox<'a>(&'a Row<'a>);

impl<'a> StoredSandbox<'a> {
    pub(super) const fn new(row: &'a Row<'a>) -> Self {
        Self(row)
    }

    /// Its id.
    ///
    /// # Errors
    ///
    /// Returns an error if the row is damaged.
    pub fn id(&self) -> Result<SandboxId, StoreError> {
        parsed(self.text(ID)?.parse())
    }

    /// When it was made (RFC 3339).
    ///
    /// # Errors
    ///
    /// Returns an error if the row is damaged.
    pub fn created_at(&self) -> Result<&str, StoreError> {
        self.text(CREATED_AT)
    }

    /// Whether its state is the one of those that run, whatever their thermal state.
    ///
    /// # Errors
    ///
    /// Returns an error if the row is damaged.
    pub fn is_running(&self) -> Result<bool, StoreError> {
        Ok(self.text(STATE)? == SandboxState::Running.as_str())
    }

    /// Appends all that the row holds, not taken apart: rows that are the same, and no others, append the same.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn append_content(&self, content: &mut Vec<u8>) -> Result<(), StoreError> {
        self.parts(|part| {
            content.extend_from_slice(part);
            true
        })
    }

    /// Whether [`append_content`](Self::append_content) would append this.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn is(&self, content: &[u8]) -> Result<bool, StoreError> {
        let mut rest = Some(content);
        self.parts(|part| {
            rest = rest.and_then(|rest| rest.strip_prefix(part));
            rest.is_some()
        })?;
        Ok(rest.is_some_and(<[u8]>::is_empty))
    }

    /// Gives `take` what each column holds, with its kind and length before it, for as long as it wants more.
    fn parts(&self, mut take: impl FnMut(&[u8]) -> bool) -> Result<(), StoreError> {
        for index in 0..self.0.as_ref().column_count() {
            let (kind, bytes): (u8, &[u8]) = match self.0.get_ref(index)? {
                ValueRef::Null => (0, &[]),
                ValueRef::Integer(number) => (1, &number.to_le_bytes()),
                ValueRef::Real(number) => (2, &number.to_le_bytes()),
                ValueRef::Text(text) => (3, text),
                ValueRef::Blob(blob) => (4, blob),
            };
            let mut before = (bytes.len() as u64).to_le_bytes();
            // No length comes near the highest byte.
            before[7] = kind;
            if !take(&before) || !take(bytes) {
                break;
            }
        }
        Ok(())
    }

    fn text(&self, index: usize) -> Result<&str, StoreError> {
        parsed(self.0.get_ref(index)?.as_str())
    }

    /// What the row says.
    ///
    /// # Errors
    ///
    /// Returns an error if the row is damaged.
    pub fn read(&self) -> Result<SandboxRow, StoreError> {
        read(self.0)
    }
}

pub(super) fn read(row: &Row<'_>) -> Result<SandboxRow, StoreError> {
    let text = |index: usize| parsed(row.get::<_, String>(index));
    let maybe_text = |index: usize| parsed(row.get::<_, Option<String>>(index));
    let time = |index: usize| parsed(row.get(index));
    let lent = |index: usize| parsed(row.get_ref(index)?.as_str());
    let number = |index: usize| parsed(row.get::<_, u64>(index));
    let maybe = |index: usize| parsed(row.get_ref(index)?.as_str_or_null());
    let (reason, address) = (maybe(4)?, maybe(21)?);
    let state = match (lent(3)?, reason) {
        ("creating", None) => SandboxState::Creating,
        ("running", None) => SandboxState::Running,
        ("stopped", None) => SandboxState::Stopped,
        ("destroyed", None) => SandboxState::Destroyed,
        ("failed", Some(reason)) => SandboxState::Failed(parsed(reason.parse())?),
        (state, _) => return Err(StoreError::Damaged(format!("the state `{state}`"))),
    };
    Ok(SandboxRow {
        id: parsed(lent(ID)?.parse())?,
        owner: parsed(lent(1)?.parse())?,
        spec: SandboxSpec {
            name: parsed(lent(2)?.parse())?,
            cpus: parsed(CpuCount::try_from(number(5)?))?,
            memory: parsed(MemoryMib::try_from(number(6)?))?,
            disk: read_disk(parsed(row.get(22))?)?,
            environment: parse_environment(lent(7)?)?,
            keep_hot: parsed(row.get(9))?,
            labels: parse_labels(lent(13)?)?,
            secrets: parse_secrets(lent(14)?)?,
            init: text(15)?,
            image: parsed(lent(18)?.parse())?,
            network: network_spec(lent(19)?, lent(20)?)?,
        },
        state,
        created_at: text(CREATED_AT)?,
        origin: text(10)?,
        agent_token: text(11)?,
        identity: maybe_text(12)?,
        expires_at: time(16)?,
        stopped_at: maybe_text(17)?,
        address: address.map(|address| parsed(address.parse())).transpose()?,
        volumes: parse_attachments(lent(23)?)?,
    })
}

/// A column of a disk's size.
pub(crate) fn read_disk(mib: Option<u64>) -> Result<Option<DiskMib>, StoreError> {
    mib.map(|mib| parsed(DiskMib::try_from(mib))).transpose()
}

fn parse_environment(text: &str) -> Result<Environment, StoreError> {
    let variable = |entry: &str| {
        let (name, value) = entry.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    let variables: Option<BTreeMap<_, _>> = text.split_terminator('\0').map(variable).collect();
    let variables =
        variables.ok_or_else(|| StoreError::Damaged("an environment without `=`".to_owned()))?;
    parsed(Environment::try_from(variables))
}
