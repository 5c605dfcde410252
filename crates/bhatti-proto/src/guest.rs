//! The JSON messages by which the host makes a guest what it is: after the boot, around a snapshot, after each restore.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::message::is_false;

/// A file that the host puts into the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigFile {
    /// Its content, in base64.
    pub content: String,
    /// Its permission bits in octal; 0644 if empty.
    #[serde(default)]
    pub mode: String,
}

/// A volume that the guest mounts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigVolume {
    /// Its device.
    pub device: String,
    /// Where it is mounted.
    pub mount: String,
    /// Its file system.
    pub fs: String,
    /// Whether it is read only. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
}

/// What a guest is to be. The keys are those of the original system's configuration drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// The sandbox's id.
    #[serde(default)]
    pub sandbox_id: String,
    /// The host name.
    #[serde(default)]
    pub hostname: String,
    /// What each connection must begin with from now on; nothing if empty.
    #[serde(default)]
    pub token: String,
    /// Variables of every process.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Files, by path.
    #[serde(default)]
    pub files: BTreeMap<String, ConfigFile>,
    /// Volumes, in the order of mounting.
    #[serde(default)]
    pub volumes: Vec<ConfigVolume>,
    /// A script that runs as the session `init`; none if empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub init: String,
    /// Name servers; the image's own if empty.
    #[serde(default)]
    pub dns: Vec<String>,
    /// Who processes run as unless a request says otherwise; the usual user if empty.
    #[serde(default)]
    pub user: String,
    /// The address of its network card; absent if it has none. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<GuestNetwork>,
}

/// The address of a network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// The card's name in the guest.
    pub interface: String,
    /// Its IPv4 address with the prefix length: `10.0.1.2/24`.
    pub address: String,
    /// Where everything beyond that goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Its link address; the card's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// What a restored guest is to be from now on, so that it is not its parent any more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random bytes of the host, in base64.
    pub entropy: String,
    /// The host's wall clock, in nanoseconds since 1970.
    pub wall_clock_ns: u64,
    /// The machine id: 32 hex digits.
    pub machine_id: String,
    /// Everything else, in place of the parent's.
    pub config: GuestConfig,
    /// Whether this is only for practice: what is done once stays to be done, and the settings stay what they are. Under software emulation
    /// the first time of everything takes many times as long as the second.
    #[serde(default, skip_serializing_if = "is_false")]
    pub rehearsal: bool,
}

/// What came of one part of an identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Applied {
    /// It holds now.
    Done,
    /// There was nothing to do.
    #[default]
    Nothing,
    /// It could not be done.
    Failed {
        /// Why.
        message: String,
    },
}

/// What a guest did with an [`Identity`].
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
    /// The environment of processes to come was replaced.
    pub environment: Applied,
    /// The files were written.
    pub files: Applied,
    /// What a guest gets once, at its first configuration: volumes, name servers, the init script.
    #[serde(default)]
    pub first_setup: Applied,
    /// The network card has its address.
    pub addresses: Applied,
    /// The parent's connections were cut.
    pub connections: Applied,
    /// The guest's wall clock when all of that was done, in nanoseconds since 1970: by it the host knows how far it may be off. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_ns: Option<u64>,
}

/// The guest's init script, if its configuration has none because files had to come first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInit {
    /// The script, which runs as the session `init`.
    pub script: String,
}

/// The guest is about to be saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspend {
    /// Whether what was written to its disks must be on them.
    #[serde(default)]
    pub sync: bool,
}

/// The guest has stood still, and is the one that it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Woken {
    /// Random bytes of the host, in base64.
    pub entropy: String,
    /// The host's wall clock, in nanoseconds since 1970.
    pub wall_clock_ns: u64,
}
