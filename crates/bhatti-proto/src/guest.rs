//! The JSON messages with which the host sets up a guest: after the boot, around a snapshot, and
//! after each restore.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::is_false;

/// A file that the host writes into the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigFile {
    /// The content, in base64.
    pub content: String,
    /// The permission bits in octal; 0644 if empty.
    #[serde(default)]
    pub mode: String,
}

/// A volume that the guest mounts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigVolume {
    /// The block device.
    pub device: String,
    /// The mount point.
    pub mount: String,
    /// The file system type.
    pub fs: String,
    /// Whether the volume is mounted read-only. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
}

/// The configuration of a guest. The keys are those of the original system's configuration drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// The sandbox's id.
    #[serde(default)]
    pub sandbox_id: String,
    /// The host name.
    #[serde(default)]
    pub hostname: String,
    /// The token that every later connection must begin with; none if empty.
    #[serde(default)]
    pub token: String,
    /// The environment variables of every process.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Files, by path.
    #[serde(default)]
    pub files: BTreeMap<String, ConfigFile>,
    /// Volumes, in mount order.
    #[serde(default)]
    pub volumes: Vec<ConfigVolume>,
    /// A script that runs as the session `init`; none if empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub init: String,
    /// Name servers; those of the image if empty.
    #[serde(default)]
    pub dns: Vec<String>,
    /// The user that processes run as unless a request names another; the usual user if empty.
    #[serde(default)]
    pub user: String,
    /// The directory in which processes start unless a request names another; the usual directory
    /// if empty. Optional, new.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub workdir: String,
    /// The address of the network card; absent if there is none. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<GuestNetwork>,
}

/// The address of a network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// The card's name in the guest.
    pub interface: String,
    /// The IPv4 address with the prefix length: `10.0.1.2/24`.
    pub address: String,
    /// The default gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The link address; the card's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// The identity that a restored guest takes on, so that it shares nothing unique with its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random bytes from the host, in base64.
    pub entropy: String,
    /// The host's wall clock, in nanoseconds since 1970.
    pub wall_clock_ns: u64,
    /// The machine id: 32 hex digits.
    pub machine_id: String,
    /// All other settings, which replace the parent's.
    pub config: GuestConfig,
    /// Whether this is a warm-up run: one-time steps are left for the real identity, and the
    /// settings stay unchanged. Under software emulation the first run of any code takes many
    /// times as long as the second.
    #[serde(default, skip_serializing_if = "is_false")]
    pub rehearsal: bool,
}

/// The outcome of one part of an identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Applied {
    /// The part was applied.
    Done,
    /// There was nothing to do.
    #[default]
    Nothing,
    /// The part could not be applied.
    Failed {
        /// The cause.
        message: String,
    },
}

/// A guest's report on an [`Identity`] that it took on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityReport {
    /// The random number generator was fed and reseeded.
    pub rng: Applied,
    /// The wall clock was set.
    pub wall_clock: Applied,
    /// The host name was set.
    pub hostname: Applied,
    /// The machine id was written.
    pub machine_id: Applied,
    /// The token was replaced.
    pub token: Applied,
    /// The environment of later processes was replaced.
    pub environment: Applied,
    /// The files were written.
    pub files: Applied,
    /// The first setup was done: volumes, name servers, the init script. A guest gets it once.
    #[serde(default)]
    pub first_setup: Applied,
    /// The network card has its address.
    pub addresses: Applied,
    /// The parent's connections were cut.
    pub connections: Applied,
    /// The guest's wall clock after all parts, in nanoseconds since 1970. The host computes from
    /// it how far that clock may be off. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_ns: Option<u64>,
}

/// The guest's init script. The configuration leaves it out if files must be written before the
/// script starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInit {
    /// The script, which runs as the session `init`.
    pub script: String,
}

/// A request to suspend the guest before a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspend {
    /// Whether pending writes must be flushed to the guest's disks.
    #[serde(default)]
    pub sync: bool,
}

/// Tells the guest that it was suspended, and that it is still the same sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Woken {
    /// Random bytes from the host, in base64.
    pub entropy: String,
    /// The host's wall clock, in nanoseconds since 1970.
    pub wall_clock_ns: u64,
}
