//! Making directories, removing and renaming.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bhatti_proto::{AgentError, ErrorKind, MkdirRequest, RemoveRequest, RenameRequest};
use rustix::fs::{AtFlags, Gid, Uid, chownat};

use super::{checked, parse_mode};
use crate::agent::Agent;
use crate::refusal::{OpError, io_refused, refused};
use crate::user::USUAL_UID;

/// Permission bits of a new directory whose request names none.
const DIRECTORY_MODE: u32 = 0o755;

/// Serves one `FILE_MKDIR_REQ`.
pub(crate) fn mkdir(agent: &Agent, request: &MkdirRequest) -> Result<(), AgentError> {
    let path = checked(&request.path)?;
    let mode = parse_mode(&request.mode, DIRECTORY_MODE)?;
    let failed = |error: &io::Error| io_refused("mkdir", &path, error);
    if request.parents && path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(request.parents).create(&path).map_err(|error| failed(&error))?;
    // To the bit, whatever the umask; and the user's, as every file that the host makes.
    let settled = fs::set_permissions(&path, fs::Permissions::from_mode(mode));
    settled.and_then(|()| give_to_user(agent, &path)).map_err(|error| failed(&error))
}

fn give_to_user(agent: &Agent, path: &Path) -> io::Result<()> {
    if !agent.place.is_guest() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(USUAL_UID), Gid::from_raw(USUAL_UID));
    Ok(chownat(rustix::fs::CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Serves one `FILE_REMOVE_REQ`. A link goes, and not what it leads to.
pub(crate) async fn remove(request: &RemoveRequest) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let recursive = request.recursive;
    // A tree may take long.
    let removed = tokio::task::spawn_blocking(move || {
        let is_directory = path.symlink_metadata().map(|metadata| metadata.is_dir());
        let removed = is_directory.and_then(|is_directory| match (is_directory, recursive) {
            (true, true) => fs::remove_dir_all(&path),
            (true, false) => fs::remove_dir(&path),
            (false, _) => fs::remove_file(&path),
        });
        removed.map_err(|error| io_refused("remove", &path, &error))
    });
    Ok(removed.await.map_err(|_| refused(ErrorKind::Other, "the removal was interrupted"))??)
}

/// Serves one `FILE_RENAME_REQ`.
pub(crate) fn rename(request: &RenameRequest) -> Result<(), AgentError> {
    let (from, to) = (checked(&request.from)?, checked(&request.to)?);
    fs::rename(&from, &to).map_err(|error| io_refused("rename", &from, &error))
}
