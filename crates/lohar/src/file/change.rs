//! Making directories, removing and renaming.

use std::fs;
use std::io;
use std::path::Path;

use bhatti_proto::{AgentError, MkdirRequest, RemoveRequest, RenameRequest};
use rustix::fs::{CWD, Mode, OFlags, fchmod, mkdirat, openat};

use super::in_place::parse_owner;
use super::remove::remove_tree;
use super::target::make_directories;
use super::{DIRECTORY_MODE, checked, parent, parse_mode, worker};
use crate::Agent;
use crate::refusal::{OpError, io_refused};

/// Serves one `FILE_MKDIR_REQ`.
pub(crate) async fn mkdir(agent: &Agent, request: &MkdirRequest) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let mode = parse_mode(&request.mode)?.unwrap_or(DIRECTORY_MODE);
    let parents = request.parents;
    if let Some(owner) = &request.owner {
        let owner = parse_owner(owner)?;
        let make = move || {
            let made = make_directories(&path, Some(owner), &mut Vec::new());
            made.map_err(|error| io_refused("mkdir", &path, &error))
        };
        return worker::begin_as_agent(agent, make).await?.end().await;
    }
    let make =
        move || make(&path, mode, parents).map_err(|error| io_refused("mkdir", &path, &error));
    worker::begin(agent, request.user.as_deref(), make).await?.end().await
}

fn make(path: &Path, mode: u32, parents: bool) -> io::Result<()> {
    if parents {
        if path.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(parent(path))?;
    }
    make_one(path, mode)
}

/// Makes a directory with exactly these permission bits, regardless of the umask. Sets them by
/// its descriptor, because the path may lead elsewhere by then.
pub(super) fn make_one(path: &Path, mode: u32) -> io::Result<()> {
    mkdirat(CWD, path, Mode::RWXU)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = openat(CWD, path, flags, Mode::empty())?;
    Ok(fchmod(&made, Mode::from_raw_mode(mode))?)
}

/// Serves one `FILE_REMOVE_REQ`. Removes a link itself, not its target.
pub(crate) async fn remove(agent: &Agent, request: &RemoveRequest) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let recursive = request.recursive;
    let remove = move || {
        let is_directory = path.symlink_metadata().map(|metadata| metadata.is_dir());
        let removed = is_directory.and_then(|is_directory| match (is_directory, recursive) {
            (true, true) => remove_tree(&path),
            (true, false) => fs::remove_dir(&path),
            (false, _) => fs::remove_file(&path),
        });
        removed.map_err(|error| io_refused("remove", &path, &error))
    };
    worker::begin(agent, request.user.as_deref(), remove).await?.end().await
}

/// Serves one `FILE_RENAME_REQ`.
pub(crate) async fn rename(agent: &Agent, request: &RenameRequest) -> Result<(), OpError> {
    let (from, to) = (checked(&request.from)?, checked(&request.to)?);
    let rename = move || -> Result<(), AgentError> {
        fs::rename(&from, &to).map_err(|error| io_refused("rename", &from, &error))
    };
    worker::begin(agent, request.user.as_deref(), rename).await?.end().await
}
