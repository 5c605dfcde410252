//! TLS with a certificate from files, which may be renewed while the daemon runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

/// The protocols that a client may choose from, the best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// How often to check at most whether the files have changed.
const LOOK: Duration = Duration::from_secs(10);

/// A certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not readable, or not a PEM file.
    #[error("failed to read `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: pem::Error,
    },
    /// The file has no certificate.
    #[error("`{}` has no certificate", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key do not belong together, or are of an unsupported kind.
    #[error("the certificate in `{}` cannot be used with the key in `{}`", certificate.display(), key.display())]
    Unusable {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The cause.
        #[source]
        source: rustls::Error,
    },
}

/// The server's side of TLS.
#[derive(Debug)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    current: Mutex<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    written: Option<SystemTime>,
    looked: Instant,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Current").field("written", &self.written).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads a certificate chain and its private key, both PEM. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// Returns the file that cannot be used.
    pub fn from_files(certificate: PathBuf, key: PathBuf) -> Result<Arc<Self>, TlsError> {
        let current = Mutex::new(Current {
            acceptor: read(&certificate, &key)?,
            written: written(&certificate).ok(),
            looked: Instant::now(),
        });
        Ok(Arc::new(Self { certificate, key, current }))
    }

    /// Returns the acceptor for the next connection. Reads the files again if they have changed;
    /// if they cannot be used, keeps the earlier certificate.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        let (acceptor, before) = {
            let mut current = self.current.lock();
            let is_due = current.looked.elapsed() >= LOOK;
            if is_due {
                current.looked = Instant::now();
            }
            (current.acceptor.clone(), is_due.then_some(current.written))
        };
        // One connection reads the files, without the lock: others need not wait for the disk.
        let Some(before) = before else { return acceptor };
        match bhatti_host::blocking(|| self.read_changed(before)) {
            Ok(None) => acceptor,
            Ok(Some((renewed, written))) => {
                tracing::info!("Read the renewed TLS certificate");
                let mut current = self.current.lock();
                current.acceptor = renewed.clone();
                current.written = Some(written);
                renewed
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "The changed TLS certificate cannot be used; the earlier one stays in use"
                );
                acceptor
            }
        }
    }

    /// Reads the files, if they were written since `before`.
    fn read_changed(
        &self,
        before: Option<SystemTime>,
    ) -> Result<Option<(TlsAcceptor, SystemTime)>, TlsError> {
        let Ok(written) = written(&self.certificate) else { return Ok(None) };
        if Some(written) == before {
            return Ok(None);
        }
        Ok(Some((read(&self.certificate, &self.key)?, written)))
    }
}

fn written(certificate: &Path) -> io::Result<SystemTime> {
    fs::metadata(certificate)?.modified()
}

fn read(certificate: &Path, key: &Path) -> Result<TlsAcceptor, TlsError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::File { path, source }
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(failed(certificate))?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate { path: certificate.to_owned() });
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(failed(key))?;
    let unusable = |source| TlsError::Unusable {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        source,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(unusable)?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_certificate(directory: &Path, name: &str) -> (PathBuf, PathBuf) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let (certificate, key) = (directory.join("cert.pem"), directory.join("key.pem"));
        fs::write(&certificate, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        (certificate, key)
    }

    #[test]
    fn unusable_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = write_certificate(directory.path(), "localhost");
        let of = |certificate: &Path, key: &Path| {
            Tls::from_files(certificate.to_owned(), key.to_owned()).unwrap_err().to_string()
        };
        let missing = directory.path().join("missing.pem");
        assert!(of(&missing, &key).contains("missing.pem"));
        assert!(of(&certificate, &missing).contains("missing.pem"));
        assert!(of(&key, &key).contains("has no certificate"));
        let other = tempfile::tempdir().unwrap();
        let (_, other) = write_certificate(other.path(), "localhost");
        assert!(of(&certificate, &other).contains("cannot be used with the key"));
    }

    #[tokio::test(start_paused = true)]
    async fn renewed_certificate_is_used_and_a_broken_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = write_certificate(directory.path(), "localhost");
        let tls = Tls::from_files(certificate.clone(), key).unwrap();
        let same =
            |one: &TlsAcceptor, other: &TlsAcceptor| Arc::ptr_eq(one.config(), other.config());
        let change = |content: Option<&str>, seconds| {
            match content {
                Some(content) => fs::write(&certificate, content).unwrap(),
                None => drop(write_certificate(directory.path(), "localhost")),
            }
            let later = SystemTime::now() + Duration::from_secs(seconds);
            fs::File::open(&certificate).unwrap().set_modified(later).unwrap();
        };
        let first = tls.acceptor();

        change(Some("broken"), 100);
        tokio::time::advance(2 * LOOK).await;
        assert!(same(&tls.acceptor(), &first));
        change(None, 200);
        assert!(same(&tls.acceptor(), &first), "not looked at for a while");
        tokio::time::advance(2 * LOOK).await;
        assert!(!same(&tls.acceptor(), &first));
    }
}
