//! The key with which a data directory's secrets are encrypted.

use std::fs;
use std::path::Path;

use bhatti_control::seal_context;
use bhatti_secret::{EARLIER_FILE, EarlierError, EarlierKey, FILE, KeyError, SecretKey};
use bhatti_store::{Ciphertext, Store};
use tracing::{info, warn};

use crate::error::CliError;

const LOST_KEY: &str =
    "restore it from a backup, or delete all secrets: bhatti serve --forget-secrets";

/// Opens the key of the data directory. If the store has secrets, their key must exist. Secrets of
/// an earlier version are encrypted anew.
pub(super) async fn open(data_dir: &Path, store: &Store) -> Result<SecretKey, CliError> {
    let stored = store.ciphertexts().map_err(|error| CliError::of(&error))?;
    let (earlier, current): (Vec<_>, Vec<_>) =
        stored.into_iter().partition(|secret| EarlierKey::has_sealed(&secret.bytes));
    let key = SecretKey::open(data_dir, !current.is_empty()).map_err(|error| match error {
        KeyError::Damaged { .. } | KeyError::Missing { .. } => CliError::of(&error).hint(LOST_KEY),
        KeyError::File { .. } | KeyError::Random => CliError::of(&error),
    })?;
    if !earlier.is_empty() {
        encrypt_anew(data_dir, store, &key, earlier).await?;
    }
    Ok(key)
}

/// Encrypts secrets of an earlier version with the current key. The earlier key's file stays: it
/// decrypts earlier copies of the store.
async fn encrypt_anew(
    data_dir: &Path,
    store: &Store,
    key: &SecretKey,
    mut secrets: Vec<Ciphertext>,
) -> Result<(), CliError> {
    let earlier_key =
        EarlierKey::open(data_dir).map_err(|error| CliError::of(&error).hint(LOST_KEY))?;
    for secret in &mut secrets {
        let plain = earlier_key.unseal(&secret.bytes).await.map_err(|error| match error {
            EarlierError::NoProgram => CliError::of(&error)
                .hint("install it for this start of the daemon: apt-get install age"),
            EarlierError::Run(_) => CliError::of(&error),
            EarlierError::Refused { .. } => CliError::of(&error).hint(LOST_KEY),
        })?;
        secret.bytes = key
            .seal(&seal_context(&secret.owner, &secret.name), &plain)
            .map_err(|error| CliError::of(&error))?;
    }
    store.replace_ciphertexts(&secrets).map_err(|error| CliError::of(&error))?;
    info!(secrets = secrets.len(), key = FILE, "Encrypted the secrets of an earlier version anew");
    Ok(())
}

/// Deletes all secrets, which cannot be read without their key. The keys' files are renamed, in
/// case they are needed after all.
pub(super) fn forget_secrets(data_dir: &Path, store: &Store) -> Result<(), CliError> {
    let forgotten = store.forget_all_secrets().map_err(|error| CliError::of(&error))?;
    for name in [FILE, EARLIER_FILE] {
        let key = data_dir.join(name);
        if key.exists() {
            fs::rename(&key, key.with_extension("key.old"))?;
        }
    }
    warn!(forgotten, "Deleted all secrets");
    Ok(())
}
