//! What this API keeps with a sandbox, in the sandbox's row.

use std::collections::BTreeMap;

use bhatti_store::SandboxRow;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

/// Seconds until a sandbox ends, if a creation names no time.
pub(crate) const TIMEOUT_SEC: u32 = 300;

/// The most that is kept of a sandbox, in bytes of JSON: every list reads it.
const ANNEX_BYTES_MAX: usize = 16 << 10;

/// The settings of a sandbox. A sandbox of the native API has the defaults.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Settings {
    /// The template as the creation named it.
    pub(crate) template: String,
    /// Keys and values of the user, of any form.
    pub(crate) metadata: BTreeMap<String, String>,
    /// Seconds until the end, as the creation asked.
    pub(crate) timeout_sec: u32,
    /// Whether a request wakes a stopped sandbox.
    pub(crate) auto_resume: bool,
    /// Whether the pause at the end of the time keeps the memory.
    pub(crate) keeps_memory: bool,
    /// Whether the last pause kept the disk only.
    pub(crate) is_disk_only: bool,
    /// Whether ports other than the sandbox side's need no token.
    pub(crate) public_traffic: bool,
    /// `allow_internet_access` as the creation gave it.
    pub(crate) internet: Option<bool>,
    /// `network` as the creation gave it.
    pub(crate) network: Option<Value>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            template: String::new(),
            metadata: BTreeMap::new(),
            timeout_sec: TIMEOUT_SEC,
            auto_resume: false,
            keeps_memory: true,
            is_disk_only: false,
            public_traffic: true,
            internet: None,
            network: None,
        }
    }
}

/// The key of these settings in the row's annex.
#[derive(Serialize, Deserialize)]
struct Annex {
    e2b: Settings,
}

impl Settings {
    /// Reads the settings of a sandbox. Its labels are the metadata of a native one.
    pub(crate) fn of(row: &SandboxRow) -> Self {
        let annex = row.spec.annex.as_deref();
        let kept = annex.and_then(|annex| serde_json::from_str::<Annex>(annex).ok());
        kept.map_or_else(
            || Self {
                template: row.spec.image.to_string(),
                metadata: row.spec.labels.as_map().clone(),
                ..Self::default()
            },
            |annex| annex.e2b,
        )
    }

    /// Returns the text for the row.
    ///
    /// # Errors
    ///
    /// Returns an error if it is too long.
    pub(crate) fn checked_annex(&self) -> Result<String, Error> {
        let annex = self.to_annex();
        let bytes = annex.len();
        if bytes > ANNEX_BYTES_MAX {
            let message =
                format!("metadata and options have {bytes} bytes: at most {ANNEX_BYTES_MAX}");
            return Err(Error::bad_request(message));
        }
        Ok(annex)
    }

    /// Returns the text for the row, of settings that have been checked.
    pub(crate) fn to_annex(&self) -> String {
        serde_json::to_string(&Annex { e2b: self.clone() }).unwrap_or_default()
    }
}
