//! Secrets of earlier versions, which were encrypted with [age](https://age-encryption.org). The
//! program `age` decrypts them once, when they are encrypted anew.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use bhatti_host::process::command;
use tokio::io::AsyncWriteExt;

use crate::KeyError;

/// Name of an earlier version's key file in the data directory.
pub const EARLIER_FILE: &str = "age.key";

/// First bytes of a secret that age encrypted.
const MAGIC: &[u8] = b"age-encryption.org/";

/// A secret of an earlier version cannot be decrypted.
#[derive(Debug, thiserror::Error)]
pub enum EarlierError {
    /// The program `age` is not installed.
    #[error(
        "an earlier version encrypted the secrets with age, and the program `age` is not installed"
    )]
    NoProgram,
    /// The program could not be run.
    #[error("failed to run `age`")]
    Run(#[source] io::Error),
    /// The program refused the secret or the key.
    #[error("`age` cannot decrypt a secret with `{}`: {reason}", key.display())]
    Refused {
        /// The key file.
        key: PathBuf,
        /// The program's message.
        reason: String,
    },
}

/// The key file of an earlier version.
pub struct EarlierKey(PathBuf);

impl EarlierKey {
    /// Returns the earlier version's key of `data_dir`.
    ///
    /// # Errors
    ///
    /// Returns [`KeyError::Missing`] if there is no such file.
    pub fn open(data_dir: &Path) -> Result<Self, KeyError> {
        let path = data_dir.join(EARLIER_FILE);
        if path.exists() { Ok(Self(path)) } else { Err(KeyError::Missing { path }) }
    }

    /// Whether an earlier version has encrypted `sealed`.
    #[must_use]
    pub fn has_sealed(sealed: &[u8]) -> bool {
        sealed.starts_with(MAGIC)
    }

    /// Decrypts a secret of an earlier version.
    ///
    /// # Errors
    ///
    /// Returns an error if `age` is not installed, or refuses the secret.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the program.
    pub async fn unseal(&self, sealed: &[u8]) -> Result<Vec<u8>, EarlierError> {
        let mut command = command("age");
        command.arg("--decrypt").arg("--identity").arg(&self.0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => EarlierError::NoProgram,
            _ => EarlierError::Run(error),
        })?;
        // The secret has little more than 64 KiB, so what the program writes meanwhile fits into a
        // pipe. If the program ends early, its message says why.
        if let Some(mut stdin) = child.stdin.take() {
            drop(stdin.write_all(sealed).await);
        }
        let output = child.wait_with_output().await.map_err(EarlierError::Run)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(EarlierError::Refused { key: self.0.clone(), reason })
    }
}
