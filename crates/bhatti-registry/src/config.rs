//! The operator's settings of registries.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use http::Uri;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;

/// Settings of all registries.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// By host, or by host and port.
    pub registries: BTreeMap<String, Registry>,
    /// Certificate authorities to trust beside the system's.
    pub authorities: Vec<CertificateDer<'static>>,
}

/// Settings of one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Use HTTP without TLS.
    pub plain_http: bool,
    /// Its address may be private, or this machine's own.
    pub private: bool,
    /// Registries that are asked first, in this order.
    pub mirrors: Vec<String>,
}

impl Config {
    /// Returns the settings of a registry, given with its port or without.
    pub(crate) fn of(&self, registry: &str) -> Registry {
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        let found = self.registries.get(registry).or_else(|| self.registries.get(host));
        found.cloned().unwrap_or_default()
    }

    /// Returns the settings of TLS.
    ///
    /// # Errors
    ///
    /// Returns an error if this machine has no certificate authorities. Blocks on disk.
    pub(crate) fn tls(&self) -> io::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots.add_parsable_certificates(self.authorities.iter().cloned());
        if roots.is_empty() {
            return Err(io::Error::other(
                "this machine has no certificate authorities; install the package ca-certificates",
            ));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::new(config))
    }
}

/// Reads the certificates of authorities from a PEM file.
///
/// # Errors
///
/// Returns an error if the file cannot be read, or has no certificate. Blocks on disk.
pub fn read_authorities(file: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let text = std::fs::read(file)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let invalid = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
    let found = read.map_err(|error| invalid(format!("it is not a valid PEM file: {error}")))?;
    if found.is_empty() {
        return Err(invalid("it has no certificate".to_owned()));
    }
    Ok(found)
}

/// Returns the host and port that a URI names.
pub(crate) fn authority(uri: &Uri) -> (String, u16) {
    let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
    (uri.host().unwrap_or_default().to_owned(), uri.port_u16().unwrap_or(default))
}
