//! The contexts: remote daemons and their keys, which `bhatti login` saves.
//!
//! ```yaml
//! current_context: "box"
//! contexts: {"box":{"url":"https://box:8443","key":"bht_…"}}
//! ```
//!
//! The file belongs to other programs, too: lines with other keys stay as they are. Earlier
//! versions saved one daemon, as `api_url` and `auth_token`; it is the context `saved`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::CliError;
use crate::options::Global;

/// Environment variable that names another file than [`USUAL_FILE`].
const FILE_VARIABLE: &str = "BHATTI_CONFIG";
/// Path of the file, below the home directory.
const USUAL_FILE: &str = ".bhatti/config.yaml";

/// Name of the context without a URL: the daemon on this machine.
pub(crate) const LOCAL: &str = "local";
/// Name of the one daemon that an earlier version saved.
const EARLIER: &str = "saved";

/// The keys that this program writes into the file.
const OURS: [&str; 4] = ["current_context", "contexts", "api_url", "auth_token"];

/// A remote daemon and its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedContext {
    pub(crate) url: String,
    pub(crate) key: String,
}

/// The keys that are read from the file. Other keys belong to other programs.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Saved {
    current_context: Option<String>,
    contexts: BTreeMap<String, SavedContext>,
    api_url: Option<String>,
    auth_token: Option<String>,
}

impl Saved {
    /// Turns the daemon that an earlier version saved into a context.
    fn settle(mut self) -> Self {
        if let (Some(url), Some(key)) = (self.api_url.take(), self.auth_token.take()) {
            self.contexts.entry(EARLIER.to_owned()).or_insert(SavedContext { url, key });
            self.current_context.get_or_insert_with(|| EARLIER.to_owned());
        }
        self
    }

    fn current(&self) -> Option<&str> {
        self.current_context.as_deref().filter(|name| *name != LOCAL)
    }
}

/// Returns the daemon to call and its key; `None` for the daemon on this machine. Options given
/// now take precedence over saved ones, and so does a data directory.
pub(crate) fn choose(global: &Global) -> Result<Option<(String, String)>, CliError> {
    if let (Some(url), Some(token)) = (&global.url, &global.token) {
        return Ok(Some((url.clone(), token.clone())));
    }
    let (named, has_place) = (global.context.as_deref(), global.data_dir.is_some());
    if named == Some(LOCAL) || (has_place && named.is_none() && global.url.is_none()) {
        return Ok(None);
    }
    let saved = read_saved()?;
    if let Some(url) = &global.url {
        // A key is sent only to the daemon that it was saved for.
        let kept = saved.contexts.into_values().find(|context| context.url == *url);
        let key = global.token.clone().or_else(|| kept.map(|context| context.key));
        let key = key.ok_or_else(|| {
            CliError::new(format!("there is no API key for {url}"))
                .hint("save one with `bhatti login URL`, or set BHATTI_TOKEN")
        })?;
        return Ok(Some((url.clone(), key)));
    }
    let Some(name) = named.or_else(|| saved.current()) else { return Ok(None) };
    let SavedContext { url, key } = saved.contexts.get(name).ok_or_else(|| unknown(name))?.clone();
    Ok(Some((url, global.token.clone().unwrap_or(key))))
}

fn unknown(name: &str) -> CliError {
    CliError::new(format!("there is no context `{name}`"))
        .hint("`bhatti context list` shows all; `bhatti login URL` adds one")
}

/// Returns the saved contexts, and the name of the current one; `None` for the daemon on this
/// machine.
pub(crate) fn contexts() -> Result<(BTreeMap<String, SavedContext>, Option<String>), CliError> {
    let saved = read_saved()?;
    let current = saved.current().map(str::to_owned);
    Ok((saved.contexts, current))
}

/// Saves a context, and makes it the current one. Returns the file. A context of that name must
/// have the same URL: its key may be shown nowhere else.
pub(crate) fn add(name: &str, context: SavedContext) -> Result<PathBuf, CliError> {
    change(|saved| {
        if let Some(before) = saved.contexts.get(name)
            && before.url != context.url
        {
            return Err(CliError::new(format!("context `{name}` is {}", before.url)).hint(
                "choose another name with --name, or delete it: bhatti context delete NAME",
            ));
        }
        saved.contexts.insert(name.to_owned(), context);
        saved.current_context = Some(name.to_owned());
        Ok(())
    })
}

/// Makes a context the current one.
pub(crate) fn choose_context(name: &str) -> Result<PathBuf, CliError> {
    change(|saved| {
        if name != LOCAL && !saved.contexts.contains_key(name) {
            return Err(unknown(name));
        }
        saved.current_context = Some(name.to_owned());
        Ok(())
    })
}

/// Removes a context. If it was the current one, the daemon on this machine is from now on.
pub(crate) fn remove(name: &str) -> Result<PathBuf, CliError> {
    change(|saved| {
        saved.contexts.remove(name).ok_or_else(|| unknown(name))?;
        if saved.current() == Some(name) {
            saved.current_context = None;
        }
        Ok(())
    })
}

/// Returns the path of the file; `None` without a home directory.
fn file() -> Option<PathBuf> {
    let named = std::env::var_os(FILE_VARIABLE).filter(|path| !path.is_empty());
    let home = || std::env::var_os("HOME").filter(|home| !home.is_empty());
    named.map(PathBuf::from).or_else(|| Some(Path::new(&home()?).join(USUAL_FILE)))
}

fn read_saved() -> Result<Saved, CliError> {
    file().map_or_else(|| Ok(Saved::default()), |path| read(&path))
}

fn read(path: &Path) -> Result<Saved, CliError> {
    let failed =
        |error: &dyn std::fmt::Display| CliError::new(format!("`{}`: {error}", path.display()));
    match fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(Saved::default()),
        Ok(text) => {
            serde_saphyr::from_str(&text).map(Saved::settle).map_err(|error| failed(&error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Saved::default()),
        Err(error) => Err(failed(&error)),
    }
}

/// Changes the contexts in the file, which only its owner can read. Other content of the file
/// stays.
fn change(act: impl FnOnce(&mut Saved) -> Result<(), CliError>) -> Result<PathBuf, CliError> {
    let path = file().ok_or_else(|| {
        CliError::new("HOME is not set").hint(format!("name a file with {FILE_VARIABLE}"))
    })?;
    let mut saved = read(&path)?;
    act(&mut saved)?;
    let failed = |error| CliError::new(format!("failed to save `{}`: {error}", path.display()));
    save_in(&path, &saved).map_err(failed)?;
    Ok(path)
}

fn save_in(path: &Path, saved: &Saved) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.exists() {
        fs::create_dir_all(directory)?;
        give_to_owner_of_parent(directory)?;
    }
    let before = match fs::read_to_string(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        text => text.unwrap_or_default(),
    };
    let mut text = without_ours(&before);
    // JSON is valid YAML, too.
    if let Some(current) = &saved.current_context {
        text += &format!("current_context: {}\n", serde_json::to_string(current)?);
    }
    if !saved.contexts.is_empty() {
        text += &format!("contexts: {}\n", serde_json::to_string(&saved.contexts)?);
    }
    // A file that cannot be read back must not replace one that can.
    let read_back: Saved = serde_saphyr::from_str(&text).map_err(io::Error::other)?;
    if read_back.settle() != *saved {
        return Err(io::Error::other(
            "its contexts could not be read back; remove the lines that begin with `contexts` or `current_context`",
        ));
    }
    bhatti_host::durable::write_private(path, text.as_bytes())?;
    give_to_owner_of_parent(path)
}

/// Returns the text without our keys and their values, which may go on in indented lines.
fn without_ours(text: &str) -> String {
    let mut is_in_ours = false;
    let mut rest = String::new();
    for line in text.lines() {
        let continues = is_in_ours && (line.starts_with([' ', '\t']) || line.is_empty());
        is_in_ours = continues || OURS.iter().any(|key| is_key(line, key));
        if !is_in_ours {
            rest += line;
            rest.push('\n');
        }
    }
    rest
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
        let mut saved = read(&path).unwrap();
        assert_eq!((saved.current(), saved.contexts[EARLIER].key.as_str()), (Some(EARLIER), "x"));

        for key in ["bht_a", "bht_\"b: {"] {
            let context = SavedContext { url: "http://box:8080".into(), key: key.into() };
            saved.contexts.insert("a: \"b\"".to_owned(), context);
            saved.current_context = Some("a: \"b\"".to_owned());
            save_in(&path, &saved).unwrap();
            assert_eq!(read(&path).unwrap(), saved);
        }

        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# mine\nother: [1, 2]\n"), "{text}");
        assert_eq!((text.matches("contexts:").count(), text.matches("api_url").count()), (1, 0));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn contexts_that_were_written_by_hand_are_replaced_whole() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("config.yaml");
        let by_hand = "contexts:\n  box:\n    url: http://box\n\n    key: k\nother:\n  - 1\n";
        fs::write(&path, by_hand).unwrap();
        let mut saved = read(&path).unwrap();
        assert_eq!(saved.contexts["box"].key, "k");

        saved.current_context = Some("box".to_owned());
        save_in(&path, &saved).unwrap();

        assert_eq!(read(&path).unwrap(), saved);
        assert!(fs::read_to_string(&path).unwrap().starts_with("other:\n  - 1\n"));
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
