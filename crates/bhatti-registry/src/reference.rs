//! References: `REGISTRY/REPOSITORY:TAG@DIGEST`, in Docker's short forms too.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution;

/// Where Docker's registry answers.
const DOCKER_HUB: &str = "registry-1.docker.io";

/// A reference to an image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference(distribution::Reference);

/// A text is not a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not an image reference ({problem}): expected NAME, NAME:TAG, NAME@sha256:DIGEST or HOST/NAME…"
)]
pub struct ParseReferenceError {
    text: String,
    problem: String,
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, ParseReferenceError> {
        let refused = |problem: String| ParseReferenceError { text: text.to_owned(), problem };
        let parsed: distribution::Reference =
            text.parse().map_err(|error: distribution::ParseError| refused(error.to_string()))?;
        if parsed.digest().is_some_and(|digest| !digest.starts_with("sha256:")) {
            return Err(refused("its digest is not SHA-256".to_owned()));
        }
        Ok(Self(parsed))
    }
}

/// The whole reference, such as `docker.io/library/python:3.12-slim`.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.whole())
    }
}

impl Reference {
    /// The registry's name, with its port if it is given, such as `docker.io`.
    #[must_use]
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// The repository, such as `library/python`.
    #[must_use]
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// The tag, such as `3.12-slim`.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }

    /// The digest that the image must have, such as `sha256:…`.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        self.0.digest()
    }

    /// What the registry is asked for: the digest, or else the tag.
    #[must_use]
    pub fn version(&self) -> &str {
        self.digest().or(self.tag()).unwrap_or("latest")
    }
}

/// Returns the server of a registry. Docker's has another name than its registry.
pub(crate) fn server(registry: &str) -> &str {
    if registry == "docker.io" { DOCKER_HUB } else { registry }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_forms_are_completed() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, whole) in [
            ("alpine", "docker.io/library/alpine:latest".to_owned()),
            ("python:3.12-slim", "docker.io/library/python:3.12-slim".to_owned()),
            ("user/app", "docker.io/user/app:latest".to_owned()),
            ("ghcr.io/a/b/c:1", "ghcr.io/a/b/c:1".to_owned()),
            ("localhost:5000/app", "localhost:5000/app:latest".to_owned()),
            (&format!("app@{digest}"), format!("docker.io/library/app@{digest}")),
            (&format!("app:1@{digest}"), format!("docker.io/library/app:1@{digest}")),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), whole);
        }
    }

    #[test]
    fn other_texts_are_refused_with_the_form() {
        for text in ["", "UPPER", "a b", "app:", "app@sha256:12", "../x", "http://x/y", "a//b"] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains("expected NAME"), "{error}");
        }
    }
}
