//! The columns of a row in the table of sandboxes.

use std::collections::BTreeMap;

use bhatti_types::{
    CpuCount, DiskMib, Environment, MemoryMib, SandboxId, SandboxSpec, SandboxState, TimeLimit,
};
use rusqlite::Row;
use rusqlite::types::ValueRef;

use super::{SandboxRow, parse_labels};
use crate::desired::images::read_config;
use crate::desired::volumes::parse_attachments;
use crate::{StoreError, network_spec, parse_secrets, parsed};

/// Indexes of some columns.
const ID: usize = 0;
const STATE: usize = 3;
const CREATED_AT: usize = 8;

/// A sandbox in a list, not yet parsed.
pub struct StoredSandbox<'a>(&'a Row<'a>);

impl<'a> StoredSandbox<'a> {
    pub(super) const fn new(row: &'a Row<'a>) -> Self {
        Self(row)
    }

    /// Returns the id of the sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the row is damaged.
    pub fn id(&self) -> Result<SandboxId, StoreError> {
        parsed(self.text(ID)?.parse())
    }

    /// Returns when the sandbox was created (RFC 3339).
    ///
    /// # Errors
    ///
    /// Returns an error if the row is damaged.
    pub fn created_at(&self) -> Result<&str, StoreError> {
        self.text(CREATED_AT)
    }

    /// Whether the stored state is `running`, whatever the sandbox's activity (hot, warm or
    /// cold).
    ///
    /// # Errors
    ///
    /// Returns an error if the row is damaged.
    pub fn is_running(&self) -> Result<bool, StoreError> {
        Ok(self.text(STATE)? == SandboxState::Running.as_str())
    }

    /// Appends the raw content of all columns: two rows append the same bytes if and only if they
    /// are equal.
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

    /// Whether [`append_content`](Self::append_content) would append exactly `content`.
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

    /// Passes the content of each column to `take`, each after its kind and length, until `take`
    /// returns false.
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
            // No column is long enough to use the highest byte of its length.
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

    /// Parses the row.
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
        (state, _) => return Err(StoreError::Damaged(format!("unknown state `{state}`"))),
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
            image_config: read_config(maybe(23)?)?,
            network: network_spec(lent(19)?, lent(20)?)?,
            annex: maybe_text(25)?,
        },
        state,
        created_at: text(CREATED_AT)?,
        origin: text(10)?,
        agent_token: text(11)?,
        identity: maybe_text(12)?,
        time_limit: TimeLimit { expires_at: time(16)?, on_timeout: parsed(lent(24)?.parse())? },
        stopped_at: maybe_text(17)?,
        address: address.map(|address| parsed(address.parse())).transpose()?,
        volumes: parse_attachments(lent(26)?)?,
    })
}

/// Parses a column of a disk's size.
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
        variables.ok_or_else(|| StoreError::Damaged("environment entry without `=`".to_owned()))?;
    parsed(Environment::try_from(variables))
}
