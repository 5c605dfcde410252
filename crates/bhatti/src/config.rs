//! The configuration file: `config.yaml` in the data directory, every key optional.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bhatti_edge::Tls;
use bhatti_registry::{Registry, read_authorities};
use ipnet::Ipv4Net;
use serde::Deserialize;

use crate::error::CliError;

const FILE: &str = "config.yaml";

/// The daemon's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// The address for callers with an API key; none if absent.
    pub(crate) listen: Option<SocketAddr>,
    /// The engine.
    pub(crate) engine: EngineChoice,
    /// Firecracker's program; looked up by its usual name if absent.
    pub(crate) firecracker: Option<PathBuf>,
    /// Firecracker's jailer, for a daemon that runs as root; looked up beside Firecracker, and by
    /// its usual name, if absent.
    pub(crate) jailer: Option<PathBuf>,
    /// Docker's socket; its usual path if absent.
    pub(crate) docker: Option<PathBuf>,
    /// QEMU's program; looked up by its usual name if absent.
    pub(crate) qemu: Option<PathBuf>,
    /// Whether a daemon that runs as root may run QEMU on a kernel without Landlock; false if
    /// absent.
    pub(crate) allow_without_landlock: bool,
    /// Time limit of a boot, in seconds; 60 if absent.
    pub(crate) boot_timeout_sec: Option<u32>,
    /// When unused sandboxes are paused and saved.
    pub(crate) thermal: Thermal,
    /// Number of VMMs that wait for a sandbox to be created; 1 if absent.
    pub(crate) ready_vmms: Option<usize>,
    /// How many of them have their memory and have done the warm-up run; if absent, 1 under
    /// software emulation, else 0.
    pub(crate) ready_forks: Option<usize>,
    /// Disk space that base snapshots may take, in MiB; 8192 if absent.
    pub(crate) template_budget_mb: Option<u64>,
    /// Memory of all hot and warm sandboxes, in MiB; if absent, all but 1024 of the machine's, but
    /// at least half of it.
    pub(crate) memory_budget_mb: Option<usize>,
    /// File with the TLS certificate chain (PEM) of `listen` and `public_listen`, which then speak
    /// HTTPS; plain HTTP if absent.
    pub(crate) tls_certificate: Option<PathBuf>,
    /// File with the private key (PEM) of `tls_certificate`.
    pub(crate) tls_key: Option<PathBuf>,
    /// Address that serves published ports without an API key; none if absent.
    pub(crate) public_listen: Option<SocketAddr>,
    /// Domain under which each alias of a published port is a host name; only `ALIAS.localhost` if
    /// absent.
    pub(crate) public_zone: Option<String>,
    /// Time limit for an application in a sandbox to begin its response, in seconds; 300 if
    /// absent.
    pub(crate) proxy_timeout_sec: Option<u32>,
    /// Whether sandboxes have networks; if absent, they do if this host can set networks up.
    pub(crate) network: NetworkUse,
    /// Range from which each user gets a network of 256 addresses; 10.213.0.0/16 if absent.
    pub(crate) network_range: Option<String>,
    /// Private ranges that users other than the admin may let their sandboxes reach; none if
    /// absent.
    pub(crate) network_allowable: Vec<String>,
    /// Whether sandboxes reach this host's own addresses in the private ranges that they are
    /// allowed; false if absent.
    pub(crate) network_reach_host: bool,
    /// Name servers for names that belong to no sandbox; this host's own if absent.
    pub(crate) dns: Option<Vec<IpAddr>>,
    /// Whether those name servers are asked for names of private networks, too: names without a
    /// dot, `*.internal`, `*.local`, and the names of private addresses. If absent, such names do
    /// not exist for sandboxes.
    pub(crate) dns_private_names: bool,
    /// Disk space that pulled images may take, in MiB; no limit if absent. Beyond it, unused ones
    /// are deleted, those first that were used longest ago.
    pub(crate) pulled_images_mb: Option<u64>,
    /// PEM files of certificate authorities that registries' certificates may have, beside the
    /// system's.
    pub(crate) registry_authorities: Vec<PathBuf>,
    /// Settings of registries that images are pulled from, by host or by host and port.
    pub(crate) registries: BTreeMap<String, Registry>,
}

/// See [`Config::engine`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EngineChoice {
    /// QEMU, with KVM or without.
    #[default]
    Qemu,
    /// Firecracker, with KVM.
    Firecracker,
    /// Containers, which share this host's kernel.
    Docker,
}

/// See [`Config::network`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum NetworkUse {
    /// If this host can set them up.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// See [`Config::thermal`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Thermal {
    /// From hot to warm (paused), in milliseconds or seconds; 30 s if absent.
    pub(crate) warm_after_ms: Option<u64>,
    pub(crate) warm_after_sec: Option<u64>,
    /// From warm to cold (saved), likewise; 30 min if absent.
    pub(crate) cold_after_ms: Option<u64>,
    pub(crate) cold_after_sec: Option<u64>,
}

const NETWORK_RANGE: &str = "10.213.0.0/16";
/// Prefix length of one user's network.
const NETWORK_BITS: u8 = 24;
const WARM_AFTER: Duration = Duration::from_secs(30);
const COLD_AFTER: Duration = Duration::from_secs(30 * 60);
const TEMPLATE_BUDGET_MIB: u64 = 8192;
/// Memory that the sandboxes leave to the rest of the machine, in MiB.
const MEMORY_LEFT_MIB: usize = 1024;

impl Thermal {
    pub(crate) fn warm_after(self) -> Duration {
        chosen(self.warm_after_ms, self.warm_after_sec, WARM_AFTER)
    }

    pub(crate) fn cold_after(self) -> Duration {
        chosen(self.cold_after_ms, self.cold_after_sec, COLD_AFTER)
    }
}

fn chosen(ms: Option<u64>, sec: Option<u64>, default: Duration) -> Duration {
    ms.map(Duration::from_millis).or_else(|| sec.map(Duration::from_secs)).unwrap_or(default)
}

impl Config {
    /// Reads the configuration of `data_dir`. A missing file counts as an empty one.
    pub(crate) fn read(data_dir: &Path) -> Result<Self, CliError> {
        let path = data_dir.join(FILE);
        let failed =
            |error: &dyn std::fmt::Display| CliError::new(format!("`{}`: {error}", path.display()));
        match fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => Ok(Self::default()),
            Ok(text) => serde_saphyr::from_str(&text).map_err(|error| failed(&error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(failed(&error)),
        }
    }

    /// See [`qemu`](Self::qemu).
    pub(crate) fn qemu(&self) -> PathBuf {
        self.qemu.clone().unwrap_or_else(|| bhatti_qemu::PROGRAM.into())
    }

    /// See [`firecracker`](Self::firecracker).
    pub(crate) fn firecracker(&self) -> PathBuf {
        self.firecracker.clone().unwrap_or_else(|| bhatti_firecracker::PROGRAM.into())
    }

    /// See [`docker`](Self::docker).
    pub(crate) fn docker(&self) -> PathBuf {
        self.docker.clone().unwrap_or_else(|| bhatti_docker::SOCKET.into())
    }

    /// See [`network_range`](Self::network_range).
    pub(crate) fn network_range(&self) -> Result<Ipv4Net, CliError> {
        let text = self.network_range.as_deref().unwrap_or(NETWORK_RANGE);
        let range: Option<Ipv4Net> = text.parse().ok();
        let range = range.filter(|range| range.prefix_len() <= NETWORK_BITS);
        let bad = || CliError::new(format!("`{text}` is not a range of IPv4 networks"));
        let hint = "set `network_range` in config.yaml to a range such as 10.213.0.0/16";
        Ok(range.ok_or_else(|| bad().hint(hint))?.trunc())
    }

    /// Returns the TLS of the listeners, if there is a certificate.
    pub(crate) fn tls(&self) -> Result<Option<Arc<Tls>>, CliError> {
        match (&self.tls_certificate, &self.tls_key) {
            (Some(certificate), Some(key)) => {
                let tls = Tls::from_files(certificate.clone(), key.clone());
                Ok(Some(tls.map_err(|error| {
                    CliError::of(&error).hint("`tls_certificate` and `tls_key` in config.yaml name PEM files: the chain, and its key")
                })?))
            }
            (None, None) => Ok(None),
            (certificate, _) => {
                let missing = if certificate.is_none() { "tls_certificate" } else { "tls_key" };
                Err(CliError::new(format!("config.yaml lacks `{missing}`"))
                    .hint("TLS needs both `tls_certificate` and `tls_key`"))
            }
        }
    }

    /// See [`template_budget_mb`](Self::template_budget_mb).
    pub(crate) fn template_bytes(&self) -> u64 {
        self.template_budget_mb.unwrap_or(TEMPLATE_BUDGET_MIB) << 20
    }

    /// See [`pulled_images_mb`](Self::pulled_images_mb).
    pub(crate) fn pulled_images_bytes(&self) -> Option<u64> {
        self.pulled_images_mb.map(|mib| mib.saturating_mul(1 << 20))
    }

    /// See [`registries`](Self::registries) and
    /// [`registry_authorities`](Self::registry_authorities).
    pub(crate) fn registries(&self) -> Result<bhatti_registry::Config, CliError> {
        let mut authorities = Vec::new();
        for file in &self.registry_authorities {
            authorities.extend(read_authorities(file).map_err(|error| {
                CliError::new(format!("failed to read `{}`: {error}", file.display()))
                    .hint("see `registry_authorities` in config.yaml")
            })?);
        }
        Ok(bhatti_registry::Config { registries: self.registries.clone(), authorities })
    }

    /// See [`memory_budget_mb`](Self::memory_budget_mb).
    pub(crate) fn memory_budget_mib(&self) -> io::Result<usize> {
        if let Some(budget) = self.memory_budget_mb {
            return Ok(budget);
        }
        let bytes = bhatti_host::memory::machine_bytes()?;
        let mib = usize::try_from(bytes >> 20).map_err(io::Error::other)?;
        Ok(mib.saturating_sub(MEMORY_LEFT_MIB).max(mib / 2))
    }

    /// See [`proxy_timeout_sec`](Self::proxy_timeout_sec).
    pub(crate) fn proxy_limit(&self) -> Duration {
        Duration::from_secs(self.proxy_timeout_sec.unwrap_or(300).into())
    }

    /// See [`boot_timeout_sec`](Self::boot_timeout_sec).
    pub(crate) fn boot_limit(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_sec.unwrap_or(60).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, CliError> {
        let data = tempfile::tempdir().unwrap();
        fs::write(data.path().join(FILE), text).unwrap();
        Config::read(data.path())
    }

    #[test]
    fn every_key_is_optional() {
        assert_eq!(Config::read(Path::new("/no/such")).unwrap(), Config::default());
        assert_eq!(read("# nothing\n").unwrap(), Config::default());
        let listen = Some("127.0.0.1:8080".parse().unwrap());
        assert_eq!(
            read("listen: 127.0.0.1:8080\n").unwrap(),
            Config { listen, ..Config::default() }
        );
    }

    #[test]
    fn misspelled_key_and_bad_value_are_errors_that_name_the_file() {
        for text in ["lisen: 127.0.0.1:1", "listen: here", "boot_timeout_sec: -1", "- a"] {
            let error = read(text).unwrap_err();
            assert!(error.message.contains(FILE), "{text}: {}", error.message);
        }
    }
}
