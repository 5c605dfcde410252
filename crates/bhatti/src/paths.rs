//! Paths of the data directory and the guest agent.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::CliError;

const ROOT_DATA_DIR: &str = "/var/lib/bhatti";
const USER_DATA_DIR: &str = ".local/share/bhatti";

/// Returns the data directory: the one that was named, root's, or the user's own.
pub(crate) fn data_dir(named: Option<PathBuf>) -> Result<PathBuf, CliError> {
    let chosen = match named {
        Some(named) => named,
        None if rustix::process::geteuid().is_root() => ROOT_DATA_DIR.into(),
        None => {
            let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
            let home = home.ok_or_else(|| {
                CliError::new("HOME is not set").hint("name a directory with --data-dir")
            })?;
            Path::new(&home).join(USER_DATA_DIR)
        }
    };
    std::path::absolute(&chosen).map_err(|error| CliError::of(&error))
}

/// Creates the data directory, for its owner alone.
pub(crate) fn create_data_dir(data_dir: &Path) -> Result<(), CliError> {
    DirBuilder::new().recursive(true).mode(0o700).create(data_dir).map_err(|error| {
        CliError::new(format!(
            "failed to create the data directory `{}`: {error}",
            data_dir.display()
        ))
        .hint("choose another with --data-dir")
    })
}

/// Returns the guest agent's program: beside this program, or where a package would put it.
pub(crate) fn lohar() -> Result<PathBuf, CliError> {
    let ours = std::env::current_exe()
        .and_then(|path| path.canonicalize())
        .map_err(|error| CliError::of(&error))?;
    let beside = ours.parent().unwrap_or(Path::new("/"));
    let places = [beside.join("lohar"), beside.join("../lib/bhatti/lohar")];
    let found = places.iter().find(|place| is_file(place)).cloned();
    found.ok_or_else(|| {
        CliError::new(format!("the guest agent `lohar` is not beside `{}`", ours.display()))
            .hint("build both with `make build`, or install both")
    })
}

fn is_file(path: &Path) -> bool {
    // A path that cannot be read counts as no file.
    path.metadata().map(|metadata| metadata.is_file()).unwrap_or_else(|error: io::Error| {
        drop(error);
        false
    })
}
