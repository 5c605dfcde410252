//! Certificate authorities that images trust beyond Debian's own: those of a proxy that inspects
//! TLS, or of a company.
//!
//! Each certificate is a file `<hash>.crt` in PEM, in `ca-certificates` beside the images. Images
//! built from Debian's packages trust these certificates; imported images are left unchanged.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_host::durable;

use crate::content_hash;
use crate::store::ImageStore;

/// The directory, beside the images.
const DIRECTORY: &str = "ca-certificates";
/// Extension of the certificate files. Debian's update-ca-certificates ignores all others.
const ENDING: &str = "crt";

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Maximum size of a file of certificates, in bytes. The file of all authorities in Debian takes
/// 220 KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Certificates could not be added.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file could not be read or written.
    #[error("failed to {step} `{}`", path.display())]
    File {
        /// The step that failed.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file has no certificate.
    #[error("`{}` has no certificate in PEM (a part that begins with `{BEGIN}`)", path.display())]
    None {
        /// The file.
        path: PathBuf,
    },
    /// A file is far larger than certificates are.
    #[error("`{}` has more than {FILE_BYTES_MAX} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A part of a file is not a certificate.
    #[error("certificate {number} in `{}` is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The certificate's position in the file, from 1.
        number: usize,
    },
}

/// The certificates of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Certificates {
    /// Paths of their files, sorted by name.
    files: Vec<PathBuf>,
}

impl Certificates {
    /// Lists the certificates of a store.
    pub(crate) fn of(store: &ImageStore) -> Result<Self, CertificateError> {
        let directory = store.directory().join(DIRECTORY);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed("list", &directory)(error)),
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed("list", &directory))?.path();
            if path.extension().is_some_and(|ending| ending == ENDING) {
                files.push(path);
            }
        }
        files.sort();
        Ok(Self { files })
    }

    /// Returns the certificates' part of an image's recipe; an empty text if there are no
    /// certificates.
    pub(crate) fn recipe(&self) -> Result<String, CertificateError> {
        if self.files.is_empty() {
            return Ok(String::new());
        }
        let mut text = content_hash::of_bytes(TRUST.as_bytes());
        for file in &self.files {
            text.push_str(&content_hash::of_file(file).map_err(failed("read", file))?);
        }
        Ok(format!("{RECIPE}{}", content_hash::of_bytes(text.as_bytes())))
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Copies the certificates into the new directory `target`.
    pub(crate) fn copy_to(&self, target: &Path) -> Result<(), CertificateError> {
        fs::create_dir(target).map_err(failed("create", target))?;
        for file in &self.files {
            let copy = target.join(file.file_name().unwrap_or_default());
            fs::copy(file, &copy).map_err(failed("write", &copy))?;
        }
        Ok(())
    }
}

/// Makes the system `$1` trust the certificates beside this script. Variables point programs that
/// bring their own authorities to the system's: Python's requests and pip in virtual
/// environments, node, and programs that use rustls or their own OpenSSL.
pub(crate) const TRUST: &str = r#"#!/bin/sh
set -e
umask 022
install -m 0644 "$(dirname "$0")"/ca-certificates/*.crt "$1/usr/local/share/ca-certificates/"
chroot "$1" update-ca-certificates >/dev/null
all=/etc/ssl/certs/ca-certificates.crt
for name in SSL_CERT_FILE REQUESTS_CA_BUNDLE PIP_CERT NODE_EXTRA_CA_CERTS; do
    echo "$name=$all" >>"$1/etc/environment"
done
"#;

/// Precedes the certificates' hash in a recipe.
const RECIPE: &str = " with certificates ";

/// Returns a recipe without the certificates' part. If only the trusted certificates of an image
/// change, it is rebuilt under its name.
pub(crate) fn without(recipe: &str) -> &str {
    recipe.split_once(RECIPE).map_or(recipe, |(recipe, _)| recipe)
}

/// Returns the certificates' part of a recipe, as [`Certificates::recipe`] writes it.
pub(crate) fn part_of(recipe: &str) -> &str {
    &recipe[without(recipe).len()..]
}

/// Adds every certificate in `files`, and keeps existing ones. Adds none if one of the files is
/// not usable.
pub(crate) fn add(store: &ImageStore, files: &[PathBuf]) -> Result<(), CertificateError> {
    let mut certificates = Vec::new();
    for file in files {
        let length = fs::metadata(file).map_err(failed("read", file))?.len();
        if length > FILE_BYTES_MAX {
            return Err(CertificateError::TooLarge { path: file.clone() });
        }
        let text = fs::read_to_string(file).map_err(failed("read", file))?;
        let found = split(&text)
            .map_err(|number| CertificateError::Damaged { path: file.clone(), number })?;
        if found.is_empty() {
            return Err(CertificateError::None { path: file.clone() });
        }
        certificates.extend(found);
    }
    if certificates.is_empty() {
        return Ok(());
    }
    let directory = store.directory().join(DIRECTORY);
    fs::create_dir_all(&directory).map_err(failed("create", &directory))?;
    for certificate in certificates {
        let name = format!("{}.{ENDING}", content_hash::of_bytes(certificate.as_bytes()));
        let path = directory.join(name);
        durable::write(&path, certificate.as_bytes()).map_err(failed("write", &path))?;
    }
    Ok(())
}

/// Returns the certificates in a PEM file, each with its markers, without the file's other
/// content. The error is the number of a damaged certificate.
fn split(text: &str) -> Result<Vec<String>, usize> {
    let mut certificates = Vec::new();
    for (index, part) in text.split(BEGIN).skip(1).enumerate() {
        let number = index + 1;
        let (body, _) = part.split_once(END).ok_or(number)?;
        let encoded: String = body.split_whitespace().collect();
        let der = STANDARD.decode(&encoded).map_err(|_| number)?;
        // A certificate is an ASN.1 sequence.
        if der.first() != Some(&0x30) {
            return Err(number);
        }
        let lines: Vec<_> = encoded.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
        certificates.push(format!("{BEGIN}\n{}\n{END}\n", lines.join("\n")));
    }
    Ok(certificates)
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CertificateError {
    let path = path.to_owned();
    move |source| CertificateError::File { step, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(content: &[u8]) -> String {
        format!("{BEGIN}\n{}\n{END}\n", STANDARD.encode(content))
    }

    #[test]
    fn bundle_is_split_into_single_certificates_that_change_the_recipe() {
        let data = tempfile::tempdir().unwrap();
        let store = ImageStore::new(data.path());
        assert_eq!(Certificates::of(&store).unwrap().recipe().unwrap(), "");
        let bundle = data.path().join("bundle.pem");
        let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        fs::write(&bundle, format!("# two\n{}{key}{}", pem(b"0first"), pem(b"0second"))).unwrap();

        add(&store, &[bundle.clone(), bundle]).unwrap();

        let certificates = Certificates::of(&store).unwrap();
        let copy = data.path().join("copy");
        certificates.copy_to(&copy).unwrap();
        let mut texts: Vec<_> = fs::read_dir(&copy)
            .unwrap()
            .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
            .collect();
        texts.sort();
        assert_eq!(texts, [pem(b"0first"), pem(b"0second")], "no key and no duplicates");
        let recipe = format!("debian x{}", certificates.recipe().unwrap());
        assert!(recipe.len() > "debian x".len() + RECIPE.len(), "{recipe}");
        assert_eq!(without(&recipe), "debian x");
        assert_eq!(part_of(&recipe), certificates.recipe().unwrap());
        assert_eq!((without("debian x"), part_of("debian x")), ("debian x", ""));
    }

    #[test]
    fn file_without_a_valid_certificate_is_named_and_nothing_is_added() {
        let data = tempfile::tempdir().unwrap();
        let store = ImageStore::new(data.path());
        let file = |name: &str, text: &str| {
            let path = data.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let good = file("good", &pem(b"0good"));
        let cases = [
            (file("none", "der, perhaps"), "has no certificate in PEM"),
            (file("cut", &format!("{BEGIN}\nMAAA")), "certificate 1 in"),
            (file("odd", &format!("{}{BEGIN}\n???\n{END}", pem(b"0x"))), "certificate 2 in"),
            (file("text", &pem(b"no sequence")), "is damaged"),
            (file("large", &"x".repeat(1 << 21)), "has more than 1048576 bytes"),
            (data.path().join("missing"), "failed to read"),
        ];
        for (path, expected) in cases {
            let error = add(&store, &[good.clone(), path.clone()]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        assert!(Certificates::of(&store).unwrap().is_empty());
    }
}
