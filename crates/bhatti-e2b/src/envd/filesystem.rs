//! `filesystem.Filesystem`: files of a sandbox. The agent acts with its own rights, and new files
//! belong to the user that a request names.

use axum::extract::Request;
use axum::http::HeaderMap;
use axum::response::Response;
use bhatti_proto::{Entry, EntryKind, Place};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{methods, place, refused, user, watch};
use crate::connect::{Code, Messages, RpcError, answered, message};
use crate::{E2b, Target};

methods! {
    Stat: Unary,
    ListDir: Unary,
    MakeDir: Unary,
    Move: Unary,
    Remove: Unary,
    CreateWatcher: Unary,
    GetWatcherEvents: Unary,
    RemoveWatcher: Unary,
    WatchDir: Stream,
}

/// The prefix of the attributes that hold the metadata of a file.
pub(super) const METADATA_PREFIX: &str = "e2b.";

#[derive(Default, Deserialize)]
#[serde(default)]
struct OnPath {
    path: String,
    depth: u32,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Move {
    source: String,
    destination: String,
}

/// Carries out a call.
pub(super) async fn call(
    e2b: &E2b,
    target: Target,
    method: Method,
    request: Request,
) -> Result<Response, RpcError> {
    let headers: HeaderMap = request.headers().clone();
    let user = user(&headers)?;
    let files = Files { target: &target, user: user.as_deref() };
    let answer = match method {
        Method::Stat => {
            let OnPath { path, .. } = message(request).await?;
            files.entry(&path).await?
        }
        Method::ListDir => {
            let OnPath { path, depth } = message(request).await?;
            let listed = target.used.agent.entries_below(&path, user.as_deref(), depth.max(1));
            let listed = listed.await.map_err(|error| refused(error, user.as_deref()))?;
            let shown = listed.iter().filter(|entry| entry.kind != EntryKind::Other);
            json!({ "entries": shown.map(describe).collect::<Vec<_>>() })
        }
        Method::MakeDir => {
            let OnPath { path, .. } = message(request).await?;
            files.make_directory(&path).await?
        }
        Method::Move => {
            let Move { source, destination } = message(request).await?;
            files.rename(&source, &destination).await?
        }
        Method::Remove => {
            let OnPath { path, .. } = message(request).await?;
            files.remove(&path).await?
        }
        Method::CreateWatcher => {
            let wish = message(request).await?;
            watch::create(e2b, &target, user.as_deref(), wish).await?
        }
        Method::GetWatcherEvents => watch::events(e2b, &target, message(request).await?).await?,
        Method::RemoveWatcher => watch::remove(e2b, &target, &message(request).await?)?,
        Method::WatchDir => {
            let wish = Messages::of(request)?.only().await?;
            return watch::stream_events(target.clone(), user.as_deref(), &headers, wish).await;
        }
    };
    Ok(answered(Ok(answer)))
}

/// The files of a sandbox, as one user names them.
struct Files<'a> {
    target: &'a Target,
    user: Option<&'a str>,
}

impl Files<'_> {
    async fn place(&self, path: &str) -> Result<Place, RpcError> {
        place(self.target, path, self.user).await
    }

    async fn entry(&self, path: &str) -> Result<Value, RpcError> {
        let entry = self.target.used.agent.entry(path, self.user).await;
        Ok(json!({ "entry": describe(&entry.map_err(|error| refused(error, self.user))?) }))
    }

    async fn make_directory(&self, path: &str) -> Result<Value, RpcError> {
        let Place { path, ids, .. } = self.place(path).await?;
        let agent = &self.target.used.agent;
        match agent.entry(&path, Some("0")).await {
            Ok(entry) if entry.kind == EntryKind::Directory => {
                let message = format!("directory already exists: {path}");
                return Err(RpcError::new(Code::AlreadyExists, message));
            }
            Ok(_) => {
                let message = format!("path already exists but is not a directory: {path}");
                return Err(RpcError::new(Code::InvalidArgument, message));
            }
            Err(_) => {}
        }
        let made = agent.make_directories_of(&path, &ids).await;
        made.map_err(|error| refused(error, self.user))?;
        self.entry(&path).await
    }

    async fn rename(&self, source: &str, destination: &str) -> Result<Value, RpcError> {
        let source = self.place(source).await?.path;
        let Place { path, ids, .. } = self.place(destination).await?;
        let agent = self.target.used.agent.acting_as(Some("0"));
        let failed = |error| refused(error, self.user);
        // A move that fails makes no directories.
        agent.entry(&source, Some("0")).await.map_err(failed)?;
        if let Some((above, _)) = path.rsplit_once('/').filter(|(above, _)| !above.is_empty()) {
            agent.make_directories_of(above, &ids).await.map_err(failed)?;
        }
        agent.rename(&source, &path).await.map_err(failed)?;
        self.entry(&path).await
    }

    async fn remove(&self, path: &str) -> Result<Value, RpcError> {
        let path = self.place(path).await?.path;
        let agent = self.target.used.agent.acting_as(Some("0"));
        match agent.remove(&path, true).await.map_err(|error| refused(error, self.user)) {
            Err(error) if error.code != Code::NotFound => Err(error),
            _ => Ok(json!({})),
        }
    }
}

/// Describes a file as SDKs read it.
pub(super) fn describe(entry: &Entry) -> Value {
    let name = entry.path.rsplit('/').next().unwrap_or_default();
    let (kind, letter) = match (entry.kind, &entry.link) {
        (EntryKind::Directory, None) => ("FILE_TYPE_DIRECTORY", 'd'),
        (EntryKind::Directory, Some(_)) => ("FILE_TYPE_DIRECTORY", 'L'),
        (EntryKind::Link, _) => ("FILE_TYPE_SYMLINK", 'L'),
        (EntryKind::File, None) => ("FILE_TYPE_FILE", '-'),
        (EntryKind::File, Some(_)) => ("FILE_TYPE_FILE", 'L'),
        (EntryKind::Other, _) => ("FILE_TYPE_UNSPECIFIED", '-'),
    };
    let mode = entry.mode & 0o777;
    let modified = jiff::Timestamp::from_nanosecond(entry.modified_ns.into()).unwrap_or_default();
    let mut described = json!({
        "name": if name.is_empty() { "/" } else { name },
        "type": kind,
        "path": entry.path,
        "size": entry.size.to_string(),
        "mode": mode,
        "permissions": permissions(letter, mode),
        "owner": entry.owner,
        "group": entry.group,
        "modifiedTime": modified.to_string(),
    });
    if let Some(link) = &entry.link {
        described["symlinkTarget"] = json!(link);
        described["isSymlink"] = json!(true);
    }
    let metadata: serde_json::Map<_, _> = entry
        .attributes
        .iter()
        .filter_map(|(name, value)| {
            Some((name.strip_prefix(METADATA_PREFIX)?.to_owned(), json!(value)))
        })
        .collect();
    if !metadata.is_empty() {
        described["metadata"] = Value::Object(metadata);
    }
    described
}

/// Writes permission bits as Go does: `-rw-r--r--`.
fn permissions(letter: char, mode: u32) -> String {
    let bits = "rwxrwxrwx".chars().enumerate();
    let bits = bits.map(|(at, bit)| if mode & (0o400 >> at) == 0 { '-' } else { bit });
    std::iter::once(letter).chain(bits).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn entry_is_described_as_sdks_read_it() {
        let mut entry = Entry {
            path: "/home/user/a b".to_owned(),
            kind: EntryKind::File,
            size: 5,
            mode: 0o4644,
            owner: "user".to_owned(),
            group: "1001".to_owned(),
            modified_ns: 1_500_000_000,
            link: None,
            attributes: BTreeMap::from([
                ("e2b.key".to_owned(), "value".to_owned()),
                ("other".to_owned(), "x".to_owned()),
            ]),
        };
        let expected = json!({
            "name": "a b", "type": "FILE_TYPE_FILE", "path": "/home/user/a b", "size": "5",
            "mode": 420, "permissions": "-rw-r--r--", "owner": "user", "group": "1001",
            "modifiedTime": "1970-01-01T00:00:01.5Z", "metadata": { "key": "value" },
        });
        assert_eq!(describe(&entry), expected);

        entry = Entry { link: Some("/x".to_owned()), kind: EntryKind::Directory, ..entry };
        let described = describe(&entry);
        assert_eq!(described["type"], "FILE_TYPE_DIRECTORY");
        assert_eq!(
            (&described["isSymlink"], &described["symlinkTarget"]),
            (&json!(true), &json!("/x"))
        );
        assert_eq!(described["permissions"], "Lrw-r--r--");
    }
}
