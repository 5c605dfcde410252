//! Who a guest is.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_proto::{ConfigFile, GuestConfig, Identity, Woken};
use bhatti_store::SandboxRow;

use crate::{networks, volumes};

/// What a guest's random number generator gets from the host, in bytes.
const ENTROPY_BYTES: usize = 32;

/// The most content of files that is told with everything else, in bytes. In base64 it takes a third more.
const FILES_TOLD_BYTES_MAX: usize = 256 << 10;

/// Random bytes of this host.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// 32 hex digits that nobody else has.
pub(crate) fn random_hex() -> Result<String, getrandom::Error> {
    Ok(format!("{:032x}", u128::from_ne_bytes(random()?)))
}

/// What a guest gets that is in no row.
#[derive(Default)]
pub(crate) struct Extras {
    /// The values of its secrets, which are variables of its environment.
    pub(crate) secrets: BTreeMap<String, String>,
    /// Files, by path.
    pub(crate) files: BTreeMap<String, GuestFile>,
}

/// A file that is put into a new guest.
pub(crate) struct GuestFile {
    pub(crate) content: Vec<u8>,
    /// Its permission bits in octal; 0644 if empty.
    pub(crate) mode: String,
}

impl Extras {
    /// Whether the files are too large to be told with everything else. They follow it then, each
    /// by itself, and the init script follows them.
    pub(crate) fn files_follow(&self) -> bool {
        self.files.values().map(|file| file.content.len()).sum::<usize>() > FILES_TOLD_BYTES_MAX
    }

    fn told_files(&self) -> BTreeMap<String, ConfigFile> {
        if self.files_follow() {
            return BTreeMap::new();
        }
        let encoded = |file: &GuestFile| ConfigFile {
            content: STANDARD.encode(&file.content),
            mode: file.mode.clone(),
        };
        self.files.iter().map(|(path, file)| (path.clone(), encoded(file))).collect()
    }
}

/// What a sandbox's guest is to be. A variable that was asked for by value wins over a secret of its name.
pub(crate) fn config(row: &SandboxRow, extras: &Extras) -> GuestConfig {
    let mut env = extras.secrets.clone();
    env.extend(row.spec.environment.as_map().clone());
    let (network, dns) = networks::of_guest(row);
    GuestConfig {
        sandbox_id: row.id.to_string(),
        hostname: row.spec.name.to_string(),
        token: row.agent_token.clone(),
        env,
        files: extras.told_files(),
        init: if extras.files_follow() { String::new() } else { row.spec.init.clone() },
        volumes: volumes::of_guest(&row.volumes),
        network,
        dns,
        ..GuestConfig::default()
    }
}

/// Makes a restored guest this sandbox's own.
pub(crate) fn identity(row: &SandboxRow, extras: &Extras) -> Result<Identity, getrandom::Error> {
    Ok(Identity {
        entropy: STANDARD.encode(random::<ENTROPY_BYTES>()?),
        wall_clock_ns: wall_clock_ns(),
        machine_id: random_hex()?,
        config: config(row, extras),
        rehearsal: false,
    })
}

/// An identity for practice. Its names are so short that no sandbox's file has to be made shorter, which would be work that was not practised.
pub(crate) fn rehearsal(has_network: bool) -> Result<Identity, getrandom::Error> {
    let (network, dns) = has_network.then(networks::rehearsal).unzip();
    Ok(Identity {
        entropy: STANDARD.encode(random::<ENTROPY_BYTES>()?),
        wall_clock_ns: wall_clock_ns(),
        machine_id: random_hex()?,
        config: GuestConfig {
            hostname: "t".to_owned(),
            network,
            dns: dns.unwrap_or_default(),
            ..GuestConfig::default()
        },
        rehearsal: true,
    })
}

/// Tells a guest that it has stood still.
pub(crate) fn woken() -> Result<Woken, getrandom::Error> {
    Ok(Woken {
        entropy: STANDARD.encode(random::<ENTROPY_BYTES>()?),
        wall_clock_ns: wall_clock_ns(),
    })
}

/// How far another clock is off, which showed `clock_ns` at most a moment ago.
pub(crate) fn clock_error(clock_ns: u64) -> Duration {
    Duration::from_nanos(wall_clock_ns().abs_diff(clock_ns))
}

fn wall_clock_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
