//! Encrypts secrets at rest, with ChaCha20-Poly1305 (RFC 8439).
//!
//! The key is a separate file beside the store, so that a copy of the store alone reveals
//! nothing.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

mod earlier;

pub use earlier::{EARLIER_FILE, EarlierError, EarlierKey};

/// Name of the key's file in the data directory.
pub const FILE: &str = "secret.key";

/// Name of the lock file that is held while the key is read or generated.
const LOCK: &str = ".secret.lock";

/// Size of a key, in bytes.
const KEY_BYTES: usize = 32;

/// First byte of a sealed secret: the version of its format. A nonce of 12 bytes, the encrypted
/// content and a tag of 16 bytes follow.
const VERSION: u8 = 1;

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
    #[error("the key file `{}` holds no key of {KEY_BYTES} bytes in hexadecimal", path.display())]
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
    /// This host gives no random bytes.
    #[error("this host gives no random bytes for a key")]
    Random,
}

/// A secret cannot be decrypted: it was encrypted with another key or for another context, or is
/// damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret cannot be decrypted with the key of this data directory")]
pub struct UnsealError;

/// A secret could not be encrypted, because this host gives no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to encrypt a secret: this host gives no random bytes")]
pub struct SealError;

/// The key of one data directory.
pub struct SecretKey {
    key: LessSafeKey,
    random: SystemRandom,
}

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
            Ok(text) => Self::parse(&text).ok_or(KeyError::Damaged { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && needed => {
                Err(KeyError::Missing { path })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::create(path),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(KeyError::Damaged { path })
            }
            Err(source) => Err(KeyError::File { step: "read", path, source }),
        }
    }

    fn of(bytes: &[u8; KEY_BYTES]) -> Option<Self> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, bytes).ok()?;
        Some(Self { key: LessSafeKey::new(key), random: SystemRandom::new() })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; KEY_BYTES];
        hex::decode_to_slice(text.trim_end(), &mut bytes).ok()?;
        Self::of(&bytes)
    }

    /// Generates a key. The file gets its name once it is complete and on disk.
    fn create(path: PathBuf) -> Result<Self, KeyError> {
        let mut bytes = [0; KEY_BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| KeyError::Random)?;
        let text = hex::encode(bytes) + "\n";
        bhatti_host::durable::write_private(&path, text.as_bytes())
            .map_err(|source| KeyError::File { step: "make", path, source })?;
        Self::of(&bytes).ok_or(KeyError::Random)
    }

    /// Encrypts `plain` for `context`, the name of the place where it is stored. A sealed secret
    /// that is moved to another place cannot be decrypted there.
    ///
    /// # Errors
    ///
    /// Returns an error if this host gives no random bytes.
    pub fn seal(&self, context: &str, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        // With random nonces, a key is safe for 2^32 secrets.
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| SealError)?;
        let mut content = plain.to_vec();
        let (nonce_of_key, aad) = (Nonce::assume_unique_for_key(nonce), Aad::from(context));
        self.key
            .seal_in_place_append_tag(nonce_of_key, aad, &mut content)
            .map_err(|_| SealError)?;
        Ok([&[VERSION][..], &nonce, &content].concat())
    }

    /// Decrypts the result of [`seal`](Self::seal) for the same context.
    ///
    /// # Errors
    ///
    /// Returns an error if `sealed` was encrypted with another key or for another context, or is
    /// damaged.
    pub fn unseal(&self, context: &str, sealed: &[u8]) -> Result<Vec<u8>, UnsealError> {
        let (nonce, content) = sealed
            .strip_prefix(&[VERSION])
            .and_then(|rest| rest.split_first_chunk::<NONCE_LEN>())
            .ok_or(UnsealError)?;
        let (nonce, mut content) = (Nonce::assume_unique_for_key(*nonce), content.to_vec());
        let plain = self.key.open_in_place(nonce, Aad::from(context), &mut content);
        Ok(plain.map_err(|_| UnsealError)?.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn key_is_generated_once_and_only_its_owner_can_read_it() {
        let data = tempfile::tempdir().unwrap();
        let sealed = SecretKey::open(data.path(), false).unwrap().seal("a", b"canary").unwrap();

        let again = SecretKey::open(data.path(), true).unwrap();

        assert_eq!(again.unseal("a", &sealed).unwrap(), b"canary");
        assert!(!sealed.windows(6).any(|window| window == b"canary"));
        let mode = fs::metadata(data.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(data.path()).unwrap().count(), 2);
    }

    #[test]
    fn damaged_or_missing_key_is_an_error_and_is_not_replaced() {
        let data = tempfile::tempdir().unwrap();
        assert!(matches!(SecretKey::open(data.path(), true), Err(KeyError::Missing { .. })));
        for text in ["", "\n", "00", "nonsense", &"g".repeat(64), &"0".repeat(66)] {
            fs::write(data.path().join(FILE), text).unwrap();
            let opened = SecretKey::open(data.path(), false);
            assert!(matches!(opened, Err(KeyError::Damaged { .. })), "{text:?}");
            assert_eq!(fs::read_to_string(data.path().join(FILE)).unwrap(), text);
        }
        fs::write(data.path().join(FILE), [0xff, 0xfe]).unwrap();
        assert!(matches!(SecretKey::open(data.path(), false), Err(KeyError::Damaged { .. })));
    }

    #[test]
    fn secret_that_is_damaged_moved_or_of_another_key_is_not_decrypted() {
        let data = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [key, other] = data.each_ref().map(|data| SecretKey::open(data.path(), false).unwrap());
        let sealed = key.seal("alice/TOKEN", b"canary").unwrap();
        assert_ne!(sealed, key.seal("alice/TOKEN", b"canary").unwrap());

        assert_eq!(other.unseal("alice/TOKEN", &sealed), Err(UnsealError));
        assert_eq!(key.unseal("bob/TOKEN", &sealed), Err(UnsealError));
        for length in 0..sealed.len() {
            assert_eq!(key.unseal("alice/TOKEN", &sealed[..length]), Err(UnsealError), "{length}");
        }
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(key.unseal("alice/TOKEN", &changed), Err(UnsealError), "{at}");
        }
        assert_eq!(key.unseal("alice/TOKEN", &sealed).unwrap(), b"canary");
    }

    #[test]
    fn keys_of_simultaneous_openers_are_the_same() {
        let data = tempfile::tempdir().unwrap();
        let open = || SecretKey::open(data.path(), false).unwrap();
        let keys: Vec<SecretKey> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let sealed = keys[0].seal("", b"canary").unwrap();
        assert!(keys.iter().all(|key| key.unseal("", &sealed).unwrap() == b"canary"));
    }
}
