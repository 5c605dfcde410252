//! Encrypts secrets at rest, with [age](https://age-encryption.org).
//!
//! The key is a separate file beside the store, so that a copy of the store alone reveals
//! nothing. `age -d -i age.key` also decrypts the sealed secrets.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use age::secrecy::ExposeSecret;
use age::x25519::Identity;

/// Name of the key's file in the data directory.
pub const FILE: &str = "age.key";

/// Name of the lock file that is held while the key is read or generated.
const LOCK: &str = ".age.lock";

/// The key cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The key file cannot be locked, read or created.
    #[error("failed to {step} the key file `{}`", path.display())]
    File {
        /// The step that failed.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The key file holds no key. It is left unchanged: without the original key, the secrets
    /// cannot be decrypted.
    #[error("the key file `{}` holds no age key", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The key file is missing, and there are secrets that need it.
    #[error("the key file `{}` is missing, and there are secrets that need it", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
}

/// A secret cannot be decrypted.
#[derive(Debug, thiserror::Error)]
#[error("a secret cannot be decrypted with the key of this data directory")]
pub struct UnsealError(#[source] age::DecryptError);

/// A secret could not be encrypted.
#[derive(Debug, thiserror::Error)]
#[error("failed to encrypt a secret")]
pub struct SealError(#[source] age::EncryptError);

/// The key of one data directory.
pub struct SecretKey(Identity);

impl SecretKey {
    /// Opens the key of `data_dir`. If there is no key, generates one, unless `needed` says that
    /// sealed secrets depend on the missing key.
    ///
    /// # Errors
    ///
    /// Returns an error if the key file cannot be read or created, if it holds no key, or if it
    /// is missing although a key is needed.
    pub fn open(data_dir: &Path, needed: bool) -> Result<Self, KeyError> {
        let path = data_dir.join(FILE);
        // A daemon and a setup may start at the same time: the second one finds the key of the
        // first. The lock ends when its file is closed.
        let lock = File::create(data_dir.join(LOCK)).and_then(|file| file.lock().map(|()| file));
        let _lock =
            lock.map_err(|source| KeyError::File { step: "lock", path: path.clone(), source })?;
        match fs::read_to_string(&path) {
            Ok(text) => parse(&text).ok_or(KeyError::Damaged { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && needed => {
                Err(KeyError::Missing { path })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(path),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(KeyError::Damaged { path })
            }
            Err(source) => Err(KeyError::File { step: "read", path, source }),
        }
    }

    /// Encrypts `plain` for this key.
    ///
    /// # Errors
    ///
    /// Returns an error if this host gives no random bytes.
    pub fn seal(&self, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        age::encrypt(&self.0.to_public(), plain).map_err(SealError)
    }

    /// Decrypts the result of [`seal`](Self::seal).
    ///
    /// # Errors
    ///
    /// Returns an error if `sealed` was encrypted for another key, or is damaged.
    pub fn unseal(&self, sealed: &[u8]) -> Result<Vec<u8>, UnsealError> {
        age::decrypt(&self.0, sealed).map_err(UnsealError)
    }
}

fn parse(text: &str) -> Option<SecretKey> {
    // The format of `age-keygen`, with comments.
    let mut lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let identity = Identity::from_str(lines.next()?.trim()).ok()?;
    lines.next().is_none().then_some(SecretKey(identity))
}

/// Generates a key. The file gets its name once it is complete and on disk.
fn create(path: PathBuf) -> Result<SecretKey, KeyError> {
    let key = SecretKey(Identity::generate());
    let text = format!("{}\n", key.0.to_string().expose_secret());
    match bhatti_host::durable::write_private(&path, text.as_bytes()) {
        Ok(()) => Ok(key),
        Err(source) => Err(KeyError::File { step: "make", path, source }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn key_is_generated_once_and_only_its_owner_can_read_it() {
        let data = tempfile::tempdir().unwrap();
        let sealed = SecretKey::open(data.path(), false).unwrap().seal(b"canary").unwrap();

        let again = SecretKey::open(data.path(), true).unwrap();

        assert_eq!(again.unseal(&sealed).unwrap(), b"canary");
        assert!(!sealed.windows(6).any(|window| window == b"canary"));
        let mode = fs::metadata(data.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(data.path()).unwrap().count(), 2);
    }

    #[test]
    fn damaged_or_missing_key_is_an_error_and_is_not_replaced() {
        let data = tempfile::tempdir().unwrap();
        assert!(matches!(SecretKey::open(data.path(), true), Err(KeyError::Missing { .. })));
        for text in ["", "\n", "AGE-SECRET-KEY-1", "nonsense"] {
            fs::write(data.path().join(FILE), text).unwrap();

            let opened = SecretKey::open(data.path(), false);

            assert!(matches!(opened, Err(KeyError::Damaged { .. })), "{text:?}");
            assert_eq!(fs::read_to_string(data.path().join(FILE)).unwrap(), text);
        }
    }

    #[test]
    fn concurrent_opens_return_the_same_key() {
        let data = tempfile::tempdir().unwrap();

        let sealed: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let open = || SecretKey::open(data.path(), false).unwrap().seal(b"x").unwrap();
            let opening: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            opening.into_iter().map(|opening| opening.join().unwrap()).collect()
        });

        let key = SecretKey::open(data.path(), true).unwrap();
        assert!(sealed.iter().all(|sealed| key.unseal(sealed).is_ok()));
    }

    #[test]
    fn secret_of_another_key_cannot_be_unsealed() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let sealed = SecretKey::open(one.path(), false).unwrap().seal(b"x").unwrap();
        let other = SecretKey::open(other.path(), false).unwrap();

        assert!(other.unseal(&sealed).is_err());
        assert!(other.unseal(b"").is_err());
    }
}
