//! Files with all of their attributes, for hosts that act for many users of the guest. The agent
//! looks with its own rights.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use bhatti_proto::{
    AgentError, Entry, EntryKind, EntryRequest, ErrorKind, FrameType, Place, exit_payload,
};
use tokio::sync::mpsc;

use super::info::{Frame, LISTING_FRAME_BYTES};
use super::{checked, worker, xattrs};
use crate::Agent;
use crate::connection::{HostWriter, Transport};
use crate::launch::path_at_home;
use crate::refusal::{OpError, host_gone, io_refused, refused};
use crate::user::{self, names};

/// The most levels of directories that a list goes down.
const DEPTH_MAX: usize = 512;

/// The most entries of one directory: the agent, whose memory is limited, sorts them.
const NAMES_MAX: usize = 100_000;

/// The most links that are followed one after the other, to say where a link leads.
const LINKS_MAX: usize = 40;

/// Serves one `PLACE_REQ`.
pub(crate) async fn place<T: Transport>(
    agent: &Agent,
    request: &EntryRequest,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let place = resolve(agent, request)?;
    Ok(writer.send_json(FrameType::PLACE_RESP, &place).await?)
}

/// Returns what a path means to a user.
fn resolve(agent: &Agent, request: &EntryRequest) -> Result<Place, AgentError> {
    let user = user::acting(agent, request.user.as_deref())?;
    let (name, ids, home) = match &user {
        Some(user) => {
            let ids = format!("{}:{}", user.uid.as_raw(), user.gid.as_raw());
            (user.name.clone(), ids, user.home.clone())
        }
        None => ("root".to_owned(), "0:0".to_owned(), "/root".to_owned()),
    };
    let path = &request.path;
    if path.starts_with('~') && path.len() > 1 && !path.starts_with("~/") {
        let message = format!("path {path:?}: only the own home can be named by `~`");
        return Err(refused(ErrorKind::BadRequest, message));
    }
    let usual = agent.settings.borrow().workdir.clone();
    let path = path_at_home(path, usual.as_deref(), Path::new(&home));
    let path = lexically_normal(&path);
    let path = checked(&path.to_string_lossy())?.to_string_lossy().into_owned();
    Ok(Place { path, user: name, ids })
}

/// Removes `.` and `..` from an absolute path, without asking the file system.
fn lexically_normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => drop(normal.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    normal
}

/// Serves one `ENTRY_REQ`.
pub(crate) async fn entries<T: Transport>(
    agent: &Agent,
    request: &EntryRequest,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = PathBuf::from(resolve(agent, request)?.path);
    let depth = request.depth.map(|depth| usize::try_from(depth.max(1)).unwrap_or(DEPTH_MAX));
    let (sender, mut frames) = mpsc::channel::<Vec<u8>>(1);
    let look = move || {
        let mut names = Names::default();
        let mut send = |frame| sender.blocking_send(frame).is_ok();
        match depth {
            None => {
                let metadata = path.symlink_metadata();
                let metadata = metadata.map_err(|error| io_refused("stat", &path, &error))?;
                let mut frame = Frame::default();
                frame.append(&json(&names.entry(&path, &metadata))?);
                send(frame.close());
                Ok(())
            }
            Some(depth) => list(&path, depth.min(DEPTH_MAX), &mut names, &mut send),
        }
    };
    let mut looking = worker::begin_as_agent(agent, look).await?;
    while let Some(frame) = frames.recv().await {
        writer.send(FrameType::ENTRIES, &frame).await.map_err(host_gone)?;
    }
    looking.end().await?;
    writer.send(FrameType::EXIT, &exit_payload(0)).await.map_err(host_gone)
}

/// Sends the entries of a directory, by name and depth first, until the receiver is gone. Links are
/// not followed.
fn list(
    path: &Path,
    depth: usize,
    names: &mut Names,
    send: &mut impl FnMut(Vec<u8>) -> bool,
) -> Result<(), AgentError> {
    let failed = |error: &std::io::Error| io_refused("stat", path, error);
    if !fs::metadata(path).map_err(|error| failed(&error))?.is_dir() {
        let message = format!("{} is not a directory", path.display());
        return Err(refused(ErrorKind::NotDirectory, message));
    }
    let top = names_in(path).map_err(|error| failed(&error))?;
    let mut levels = vec![(path.to_owned(), top.into_iter())];
    let mut frame = Frame::default();
    while let Some((directory, entries)) = levels.last_mut() {
        let Some(name) = entries.next() else {
            levels.pop();
            continue;
        };
        let path = directory.join(name);
        // Skip an entry that has been removed meanwhile.
        let Ok(metadata) = path.symlink_metadata() else { continue };
        let json = json(&names.entry(&path, &metadata))?;
        if !frame.is_empty() && frame.len() + json.len() > LISTING_FRAME_BYTES {
            let full = std::mem::take(&mut frame);
            if !send(full.close()) {
                return Ok(());
            }
        }
        frame.append(&json);
        if metadata.is_dir() && levels.len() < depth {
            let below = names_in(&path).unwrap_or_default();
            levels.push((path, below.into_iter()));
        }
    }
    send(frame.close());
    Ok(())
}

/// Returns the names in a directory, in their order.
fn names_in(directory: &Path) -> std::io::Result<Vec<OsString>> {
    let entries = fs::read_dir(directory)?.flatten();
    let mut names: Vec<_> = entries.take(NAMES_MAX + 1).map(|entry| entry.file_name()).collect();
    if names.len() > NAMES_MAX {
        let message = format!("a directory has more than {NAMES_MAX} entries");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message));
    }
    names.sort();
    Ok(names)
}

/// The names of users and groups, as far as they were asked for.
#[derive(Default)]
struct Names {
    users: Option<HashMap<u32, String>>,
    groups: Option<HashMap<u32, String>>,
}

impl Names {
    fn entry(&mut self, path: &Path, metadata: &Metadata) -> Entry {
        let link = metadata.is_symlink().then(|| leads_to(path));
        let target = link.as_ref().and_then(|_| fs::metadata(path).ok());
        let shown = target.as_ref().unwrap_or(metadata);
        let kind = match shown.file_type() {
            kind if kind.is_file() => EntryKind::File,
            kind if kind.is_dir() => EntryKind::Directory,
            kind if kind.is_symlink() => EntryKind::Link,
            _ => EntryKind::Other,
        };
        let users = self.users.get_or_insert_with(|| names("/etc/passwd"));
        let owner = name_of(users, metadata.uid());
        let groups = self.groups.get_or_insert_with(|| names("/etc/group"));
        let group = name_of(groups, metadata.gid());
        let seconds = metadata.mtime().saturating_mul(1_000_000_000);
        Entry {
            path: path.to_string_lossy().into_owned(),
            kind,
            size: shown.size(),
            mode: shown.mode() & 0o7777,
            owner,
            group,
            modified_ns: seconds.saturating_add(metadata.mtime_nsec()),
            link: link.map(|link| link.to_string_lossy().into_owned()),
            attributes: attributes(path, metadata),
        }
    }
}

fn name_of(names: &HashMap<u32, String>, number: u32) -> String {
    names.get(&number).cloned().unwrap_or_else(|| number.to_string())
}

/// Returns the attributes `user.*` that are text.
fn attributes(path: &Path, metadata: &Metadata) -> BTreeMap<String, String> {
    if !metadata.is_file() && !metadata.is_dir() {
        return BTreeMap::new();
    }
    let all = xattrs::all(path).unwrap_or_default();
    let text = |(name, value): (String, Vec<u8>)| {
        let name = name.strip_prefix("user.")?.to_owned();
        Some((name, String::from_utf8(value).ok()?))
    };
    all.into_iter().filter_map(text).collect()
}

/// Returns where a link leads, as an absolute path. A link that leads nowhere has the path of what
/// is missing.
fn leads_to(path: &Path) -> PathBuf {
    if let Ok(path) = fs::canonicalize(path) {
        return path;
    }
    let mut at = path.to_owned();
    for _ in 0..LINKS_MAX {
        let Ok(target) = fs::read_link(&at) else { break };
        at = lexically_normal(&super::parent(&at).join(target));
    }
    at
}

fn json(entry: &Entry) -> Result<Vec<u8>, AgentError> {
    serde_json::to_vec(entry).map_err(|error| refused(ErrorKind::Other, error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn listed(path: &Path, depth: usize) -> Vec<Entry> {
        let (mut names, mut all) = (Names::default(), Vec::new());
        let mut send = |frame: Vec<u8>| {
            all.extend(serde_json::from_slice::<Vec<Entry>>(&frame).unwrap());
            true
        };
        list(path, depth, &mut names, &mut send).unwrap();
        all
    }

    #[test]
    fn tree_is_listed_by_name_and_depth_first() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir_all(place.path().join("b/c")).unwrap();
        for file in ["b/c/d", "b/a", "z", "a"] {
            fs::write(place.path().join(file), "text").unwrap();
        }
        symlink("b", place.path().join("link")).unwrap();
        let names = |depth| {
            let relative = |entry: Entry| {
                let path = Path::new(&entry.path).strip_prefix(place.path()).unwrap();
                path.to_string_lossy().into_owned()
            };
            listed(place.path(), depth).into_iter().map(relative).collect::<Vec<_>>()
        };

        assert_eq!(names(1), ["a", "b", "link", "z"]);
        assert_eq!(names(2), ["a", "b", "b/a", "b/c", "link", "z"]);
        assert_eq!(names(9), ["a", "b", "b/a", "b/c", "b/c/d", "link", "z"]);
    }

    #[test]
    fn directory_with_too_many_entries_is_refused() {
        let place = tempfile::tempdir_in("/dev/shm").unwrap();
        for number in 0..=NAMES_MAX {
            std::os::unix::fs::symlink("x", place.path().join(number.to_string())).unwrap();
        }

        let refused = list(place.path(), 1, &mut Names::default(), &mut |_| true).unwrap_err();

        assert_eq!(refused.kind, ErrorKind::BadRequest, "{}", refused.message);
        assert!(refused.message.contains("100000"), "{}", refused.message);
    }

    #[test]
    fn link_has_the_kind_of_its_target_and_says_where_it_leads() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().canonicalize().unwrap();
        fs::create_dir(place.join("a")).unwrap();
        symlink("a", place.join("good")).unwrap();
        symlink("../x/none", place.join("nowhere")).unwrap();

        let found = listed(&place, 1);

        let of = |name: &str| found.iter().find(|entry| entry.path.ends_with(name)).unwrap();
        assert_eq!(of("/good").kind, EntryKind::Directory);
        assert_eq!(of("/good").link.as_deref(), place.join("a").to_str());
        assert_eq!(of("/nowhere").kind, EntryKind::Link);
        let none = place.parent().unwrap().join("x/none");
        assert_eq!(of("/nowhere").link.as_deref(), none.to_str());
        assert_eq!(of("/a").link, None);
    }

    #[test]
    fn path_is_normal_without_the_file_system() {
        for (path, normal) in [("/a/../b/./c", "/b/c"), ("/../..", "/"), ("a//b/", "/a/b")] {
            assert_eq!(lexically_normal(Path::new(path)), Path::new(normal));
        }
    }
}
