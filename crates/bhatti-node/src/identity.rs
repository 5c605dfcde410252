//! The identity of a guest, which distinguishes it from the guest that it was forked from.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_proto::{ConfigFile, GuestConfig, Identity, PAYLOAD_BYTES_MAX, Woken};
use bhatti_store::SandboxRow;

use crate::{networks, volumes};

/// Maximum size of a guest's configuration, in bytes: one frame, less the rest of an identity.
pub(crate) const GUEST_CONFIG_BYTES_MAX: usize = PAYLOAD_BYTES_MAX - 1024;

/// The random bytes that a guest's random number generator gets from the host.
const ENTROPY_BYTES: usize = 32;

/// Maximum total size of files in the configuration, in bytes. Base64 makes them a third larger.
const CONFIG_FILES_BYTES_MAX: usize = 256 << 10;

/// Draws random bytes from this host.
///
/// # Errors
///
/// Returns an error if the host gives none.
pub fn random<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// Draws a token of 32 hex digits.
///
/// # Errors
///
/// As [`random`].
pub fn random_token() -> Result<String, getrandom::Error> {
    Ok(format!("{:032x}", u128::from_ne_bytes(random()?)))
}

/// Settings of a new guest that are not in its row.
#[derive(Default)]
pub struct Extras {
    /// The values of the secrets, which become variables of the environment.
    pub secrets: BTreeMap<String, String>,
    /// The files to write, by path.
    pub files: BTreeMap<String, GuestFile>,
}

/// A file to write into a new guest.
pub struct GuestFile {
    /// The content.
    pub content: Vec<u8>,
    /// The permission bits in octal; 0644 if empty.
    pub mode: String,
}

impl Extras {
    /// Returns whether the files are too large for the configuration. Then they follow it, each by
    /// itself, and the init script follows them.
    pub(crate) fn files_follow(&self) -> bool {
        self.files.values().map(|file| file.content.len()).sum::<usize>() > CONFIG_FILES_BYTES_MAX
    }

    fn config_files(&self) -> BTreeMap<String, ConfigFile> {
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

/// Returns the configuration of a sandbox's guest. A secret overrides a variable of the image, and
/// a variable of the sandbox's environment overrides both.
pub(crate) fn config(row: &SandboxRow, extras: &Extras) -> GuestConfig {
    let image = &row.spec.image_config;
    let mut env = image.env.clone();
    env.extend(extras.secrets.clone());
    env.extend(row.spec.environment.as_map().clone());
    let (network, dns) = networks::of_guest(row);
    GuestConfig {
        sandbox_id: row.id.to_string(),
        hostname: row.spec.name.to_string(),
        token: row.agent_token.clone(),
        env,
        files: extras.config_files(),
        init: if extras.files_follow() { String::new() } else { row.spec.init.clone() },
        volumes: volumes::of_guest(&row.volumes),
        network,
        dns,
        user: image.user.clone(),
        workdir: image.workdir.clone(),
    }
}

/// Returns the identity that a restored guest assumes.
pub(crate) fn identity(row: &SandboxRow, extras: &Extras) -> Result<Identity, getrandom::Error> {
    Ok(Identity {
        entropy: STANDARD.encode(random::<ENTROPY_BYTES>()?),
        wall_clock_ns: wall_clock_ns(),
        machine_id: random_token()?,
        config: config(row, extras),
        rehearsal: false,
    })
}

/// Returns an identity for a warm-up run. Its names are so short that assuming the real identity
/// never shortens a file, which would be code that the warm-up run did not execute.
pub(crate) fn warm_up(has_network: bool) -> Result<Identity, getrandom::Error> {
    let (network, dns) = has_network.then(networks::warm_up).unzip();
    Ok(Identity {
        entropy: STANDARD.encode(random::<ENTROPY_BYTES>()?),
        wall_clock_ns: wall_clock_ns(),
        machine_id: random_token()?,
        config: GuestConfig {
            hostname: "t".to_owned(),
            network,
            dns: dns.unwrap_or_default(),
            ..GuestConfig::default()
        },
        rehearsal: true,
    })
}

/// Returns the message for a guest that was paused.
pub(crate) fn woken() -> Result<Woken, getrandom::Error> {
    Ok(Woken {
        entropy: STANDARD.encode(random::<ENTROPY_BYTES>()?),
        wall_clock_ns: wall_clock_ns(),
    })
}

/// Returns the error of a clock that showed `clock_ns` a moment ago.
pub(crate) fn clock_error(clock_ns: u64) -> Duration {
    Duration::from_nanos(wall_clock_ns().abs_diff(clock_ns))
}

fn wall_clock_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
