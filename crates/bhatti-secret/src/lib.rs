//! Makes secrets unreadable at rest, with [age](https://age-encryption.org).
//!
//! The key is a file of its own beside the store, so that a copy of the store alone gives nothing away. `age -d -i age.key` reads what
//! was sealed, too.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use age::secrecy::ExposeSecret;
use age::x25519::Identity;

/// The key's file in the data directory.
pub const FILE: &str = "age.key";

/// Held while the key is looked for or drawn.
const LOCK: &str = ".age.lock";

/// The key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Its file cannot be read or made.
    #[error("failed to {step} the key file `{}`", path.display())]
    File {
        /// What failed.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its file holds no key. It is left as it is: what was sealed with the key that it held cannot be read without it.
    #[error("the key file `{}` holds no age key", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Its file is gone, and there are secrets that need it.
    #[error("the key file `{}` is missing, and there are secrets that need it", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
}

/// Something cannot be read any more.
#[derive(Debug, thiserror::Error)]
#[error("a secret cannot be read with the key of this data directory")]
pub struct UnsealError(#[source] age::DecryptError);

/// Something could not be sealed.
#[derive(Debug, thiserror::Error)]
#[error("failed to encrypt a secret")]
pub struct SealError(#[source] age::EncryptError);

/// The key of one data directory.
pub struct SecretKey(Identity);

impl SecretKey {
    /// The key of `data_dir`. It is drawn if there is none, unless `needed`, by something that was sealed before.
    ///
    /// # Errors
    ///
    /// Returns an error if its file cannot be read or made, or holds no key.
    pub fn open(data_dir: &Path, needed: bool) -> Result<Self, KeyError> {
        let path = data_dir.join(FILE);
        // A daemon and a set-up may begin at once: the second finds the key of the first. The lock ends with the file.
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

    /// Makes something unreadable without this key.
    ///
    /// # Errors
    ///
    /// Returns an error if this host gives no random bytes.
    pub fn seal(&self, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        age::encrypt(&self.0.to_public(), plain).map_err(SealError)
    }

    /// Reads what was sealed.
    ///
    /// # Errors
    ///
    /// Returns an error if it was sealed with another key, or is damaged.
    pub fn unseal(&self, sealed: &[u8]) -> Result<Vec<u8>, UnsealError> {
        age::decrypt(&self.0, sealed).map_err(UnsealError)
    }
}

fn parse(text: &str) -> Option<SecretKey> {
    // As `age-keygen` writes it, with comments.
    let mut lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let identity = Identity::from_str(lines.next()?.trim()).ok()?;
    lines.next().is_none().then_some(SecretKey(identity))
}

/// Draws a key. Its file gets its name when it is whole and on the disk.
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
    fn key_is_drawn_once_and_is_its_owners_alone() {
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
    fn damaged_or_missing_key_is_an_error_and_stays_so() {
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
    fn all_who_begin_at_once_have_the_same_key() {
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
    fn what_another_key_sealed_cannot_be_read() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let sealed = SecretKey::open(one.path(), false).unwrap().seal(b"x").unwrap();
        let other = SecretKey::open(other.path(), false).unwrap();

        assert!(other.unseal(&sealed).is_err());
        assert!(other.unseal(b"").is_err());
    }
}
