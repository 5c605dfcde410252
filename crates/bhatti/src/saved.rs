//! The daemon that was chosen with `bhatti setup --url`, and its key.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::CliError;
use crate::options::Global;

/// Environment variable that names another file than [`USUAL_FILE`].
const FILE_VARIABLE: &str = "BHATTI_CONFIG";
/// Path of the file, below the home directory.
const USUAL_FILE: &str = ".bhatti/config.yaml";

const URL_KEY: &str = "api_url";
const TOKEN_KEY: &str = "auth_token";

/// The keys that are read from the file. Other keys belong to other programs.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Saved {
    api_url: Option<String>,
    auth_token: Option<String>,
}

/// Returns the daemon to call and its key; `None` for the daemon on this machine. Options given
/// now take precedence over saved ones, and so does a data directory.
pub(crate) fn choose(global: &Global) -> Result<Option<(String, String)>, CliError> {
    let saved = || file().map_or_else(|| Ok(Saved::default()), |path| read(&path));
    let (url, saved) = match (&global.url, &global.data_dir) {
        (Some(url), _) if global.token.is_some() => (url.clone(), Saved::default()),
        (Some(url), _) => (url.clone(), saved()?),
        (None, Some(_)) => return Ok(None),
        (None, None) => match saved()? {
            Saved { api_url: Some(url), auth_token } => {
                (url.clone(), Saved { api_url: Some(url), auth_token })
            }
            Saved { api_url: None, .. } => return Ok(None),
        },
    };
    // A key is sent only to the daemon that it was saved for.
    let kept = saved.auth_token.filter(|_| saved.api_url.as_ref() == Some(&url));
    let token = global.token.clone().or(kept).ok_or_else(|| {
        CliError::new(format!("there is no API key for {url}")).hint(
            "name it with --token or BHATTI_TOKEN, or save it: bhatti setup --url URL --token KEY",
        )
    })?;
    Ok(Some((url, token)))
}

/// Returns the path of the file; `None` without a home directory.
fn file() -> Option<PathBuf> {
    let named = std::env::var_os(FILE_VARIABLE).filter(|path| !path.is_empty());
    let home = || std::env::var_os("HOME").filter(|home| !home.is_empty());
    named.map(PathBuf::from).or_else(|| Some(Path::new(&home()?).join(USUAL_FILE)))
}

fn read(path: &Path) -> Result<Saved, CliError> {
    let failed =
        |error: &dyn std::fmt::Display| CliError::new(format!("`{}`: {error}", path.display()));
    match fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(Saved::default()),
        Ok(text) => serde_saphyr::from_str(&text).map_err(|error| failed(&error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Saved::default()),
        Err(error) => Err(failed(&error)),
    }
}

/// Saves a daemon's URL and key in the file, for its owner alone. Other content of the file stays.
pub(crate) fn save(url: &str, token: &str) -> Result<PathBuf, CliError> {
    let path = file().ok_or_else(|| {
        CliError::new("HOME is not set").hint(format!("name a file with {FILE_VARIABLE}"))
    })?;
    save_in(&path, url, token)
        .map_err(|error| CliError::new(format!("failed to save `{}`: {error}", path.display())))?;
    // Check that the saved values are read back.
    let saved = read(&path)?;
    if saved.api_url.as_deref() == Some(url) && saved.auth_token.as_deref() == Some(token) {
        return Ok(path);
    }
    Err(CliError::new(format!(
        "`{}` has these keys in a form that cannot be read back",
        path.display()
    ))
    .hint(format!("write `{URL_KEY}` and `{TOKEN_KEY}` into it by hand")))
}

fn save_in(path: &Path, url: &str, token: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.exists() {
        fs::create_dir_all(directory)?;
        give_to_owner_of_parent(directory)?;
    }
    let before = match fs::read_to_string(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        text => text.unwrap_or_default(),
    };
    let is_ours = |line: &&str| [URL_KEY, TOKEN_KEY].iter().any(|key| is_key(line, key));
    let mut text: String =
        before.lines().filter(|line| !is_ours(line)).map(|line| format!("{line}\n")).collect();
    // JSON strings are valid YAML, too.
    for (key, value) in [(URL_KEY, url), (TOKEN_KEY, token)] {
        text += &format!("{key}: {}\n", serde_json::Value::from(value));
    }
    bhatti_host::durable::write_private(path, text.as_bytes())?;
    give_to_owner_of_parent(path)
}

fn is_key(line: &str, key: &str) -> bool {
    line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with(':'))
}

/// Gives a file of root to the owner of its directory. Under sudo, root must leave no file in a
/// user's home directory that the user cannot change.
fn give_to_owner_of_parent(path: &Path) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new("/")).metadata()?;
    std::os::unix::fs::chown(path, Some(parent.uid()), Some(parent.gid()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn save_keeps_the_rest_of_the_file_and_is_read_back() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("deep/config.yaml");
        fs::create_dir(home.path().join("deep")).unwrap();
        fs::write(&path, "# mine\nother: [1, 2]\napi_url: http://old:1\n  \nauth_token : x\n")
            .unwrap();

        for token in ["bht_a", "bht_\"b"] {
            save_in(&path, "http://box:8080", token).unwrap();
            let saved = read(&path).unwrap();
            assert_eq!(
                (saved.api_url.as_deref(), saved.auth_token.as_deref()),
                (Some("http://box:8080"), Some(token))
            );
        }

        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# mine\nother: [1, 2]\n"), "{text}");
        assert_eq!(text.matches("api_url").count(), 1);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn unreadable_file_is_an_error_that_names_the_file() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("config.yaml");
        assert_eq!(read(&path).unwrap(), Saved::default());
        fs::write(&path, "api_url: [").unwrap();
        assert!(read(&path).unwrap_err().message.contains("config.yaml"));
    }
}
