//! The configuration file: `config.yaml` in the data directory, every key optional.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::CliError;

const FILE: &str = "config.yaml";

/// The daemon's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// The address for callers with an API key; none if absent.
    pub(crate) listen: Option<SocketAddr>,
    /// QEMU's program; looked up by its usual name if absent.
    pub(crate) qemu: Option<PathBuf>,
    /// How long a VM may take to boot, in seconds; 60 if absent.
    pub(crate) boot_timeout_sec: Option<u32>,
}

impl Config {
    /// Reads the configuration of `data_dir`. A file that is not there is an empty one.
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
    fn misspelt_key_and_bad_value_are_errors_that_name_the_file() {
        for text in ["lisen: 127.0.0.1:1", "listen: here", "boot_timeout_sec: -1", "- a"] {
            let error = read(text).unwrap_err();
            assert!(error.message.contains(FILE), "{text}: {}", error.message);
        }
    }
}
