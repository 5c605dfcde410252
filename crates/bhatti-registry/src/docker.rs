//! Credentials that `docker login` has saved.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use crate::auth::Credentials;

/// Docker's name for its own registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, Auth>,
}

#[derive(Deserialize)]
struct Auth {
    auth: Option<String>,
}

/// Reads the credentials for a registry from Docker's `config.json`. Returns `None` if the file
/// does not exist or has none for it. Credentials that Docker keeps in a helper program are not
/// read.
///
/// # Errors
///
/// Returns an error if the file cannot be read, or is malformed. Blocks on disk.
pub fn docker_credentials(config: &Path, registry: &str) -> io::Result<Option<Credentials>> {
    let text = match fs::read(config) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    let config: DockerConfig = serde_json::from_slice(&text).map_err(io::Error::other)?;
    let names: &[&str] =
        if registry == "docker.io" { &[DOCKER_HUB, registry] } else { &[registry] };
    let found = names.iter().find_map(|name| {
        let with_scheme = [format!("https://{name}"), format!("http://{name}")];
        let names = std::iter::once(*name).chain(with_scheme.iter().map(String::as_str));
        let mut names = names.collect::<Vec<_>>().into_iter();
        names.find_map(|name| config.auths.get(name)?.auth.as_deref())
    });
    let Some(encoded) = found.filter(|encoded| !encoded.is_empty()) else { return Ok(None) };
    let malformed = || io::Error::other("it has a login that is malformed");
    let pair = BASE64_STANDARD.decode(encoded).map_err(|_| malformed())?;
    let pair = String::from_utf8(pair).map_err(|_| malformed())?;
    let (user, password) = pair.split_once(':').ok_or_else(malformed)?;
    Ok(Some(Credentials { user: user.to_owned(), password: password.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_of_docker_are_found_by_registry() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.json");
        let find = |registry: &str| docker_credentials(&config, registry);
        assert_eq!(find("ghcr.io").unwrap(), None);
        // u:p:q and v:r
        let text = r#"{"auths":{"ghcr.io":{"auth":"dTpwOnE="},"https://index.docker.io/v1/":{"auth":"djpy"},"helped":{}}}"#;
        fs::write(&config, text).unwrap();

        let found = find("ghcr.io").unwrap().unwrap();
        assert_eq!((found.user.as_str(), found.password.as_str()), ("u", "p:q"));
        assert_eq!(find("docker.io").unwrap().unwrap().user, "v");
        assert_eq!(find("helped").unwrap(), None);
        assert_eq!(find("other:5000").unwrap(), None);

        fs::write(&config, r#"{"auths":{"ghcr.io":{"auth":"not base64"}}}"#).unwrap();
        assert!(find("ghcr.io").unwrap_err().to_string().contains("malformed"));
    }
}
