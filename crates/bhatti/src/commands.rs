//! The commands, one file each.

pub(crate) mod bench;
mod build_work;
pub(crate) mod completion;
mod control;
pub(crate) mod create;
pub(crate) mod destroy;
pub(crate) mod detach_keys;
pub(crate) mod doctor;
pub(crate) mod edit;
mod engine;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod file;
pub(crate) mod fork;
pub(crate) mod forward;
mod hidden;
pub(crate) mod image;
mod image_build;
mod image_login;
mod image_pull;
pub(crate) mod inspect;
pub(crate) mod job_stop;
pub(crate) mod jobs;
pub(crate) mod key;
pub(crate) mod kill;
pub(crate) mod lifecycle;
pub(crate) mod list;
pub(crate) mod login;
pub(crate) mod logs;
pub(crate) mod man;
mod network;
pub(crate) mod ports;
pub(crate) mod ps;
pub(crate) mod publish;
pub(crate) mod run;
pub(crate) mod secret;
mod secret_key;
pub(crate) mod serve;
pub(crate) mod setup;
mod several;
pub(crate) mod shell;
pub(crate) mod snapshot;
pub(crate) mod template;
mod terminal;
pub(crate) mod user;
pub(crate) mod version;
pub(crate) mod volume;
pub(crate) mod wait;

use std::path::PathBuf;

use bhatti_api::{ErrorCode, Sandbox};
use bhatti_client::{Client, ClientError};

use crate::error::CliError;
use crate::options::Global;
use crate::output::Output;
use crate::{paths, saved};

/// Minimum length of an id prefix that stands for the whole id. Six digits rarely spell a word.
const PREFIX_CHARS_MIN: usize = 6;

/// The data directory, client and output of a command.
pub(crate) struct Context {
    pub(crate) data_dir: PathBuf,
    pub(crate) client: Client,
    pub(crate) output: Output,
}

impl Context {
    pub(crate) fn new(global: &Global, output: Output) -> Result<Self, CliError> {
        let data_dir = paths::data_dir(global.data_dir.clone())?;
        let endpoint = saved::choose(global)?;
        let client = match endpoint {
            Some((url, token)) => {
                Client::http(&url, &token).map_err(|error| CliError::of(&error))?
            }
            None => Client::unix(&data_dir),
        };
        Ok(Self { data_dir, client, output })
    }

    /// Returns the same context, whose file calls act as this user of the sandbox.
    fn acting_as(&self, user: Option<&str>) -> Self {
        let client = self.client.acting_as(user);
        Self { data_dir: self.data_dir.clone(), client, output: self.output }
    }

    /// Reads from the sandbox that `typed` names: by its name, its id or a prefix of its id.
    ///
    /// Only for commands that change nothing: the name of a destroyed sandbox may be the prefix of
    /// an id. For all others, see [`change`](Self::change).
    async fn read<T>(
        &self,
        typed: &str,
        act: impl AsyncFn(&str) -> Result<T, ClientError>,
    ) -> Result<T, CliError> {
        let refused = match act(typed).await {
            Err(ClientError::Refused(body)) if body.code == ErrorCode::NotFound => body,
            result => return Ok(result?),
        };
        // Prefixes come second: they cost another call, and a name takes precedence.
        match self.find_by_prefix(typed).await? {
            Some(sandbox) => Ok(act(&sandbox.id).await?),
            None => Err(ClientError::Refused(refused).into()),
        }
    }

    /// Changes the sandbox that `typed` names, or runs something in it. Accepts its name or its
    /// whole id, never a prefix: a script that destroys `db` twice must not destroy a sandbox
    /// whose id begins with `db`.
    async fn change<T>(
        &self,
        typed: &str,
        act: impl AsyncFn(&str) -> Result<T, ClientError>,
    ) -> Result<T, CliError> {
        let error = match act(typed).await {
            Err(error) => error,
            Ok(done) => return Ok(done),
        };
        let is_not_found =
            matches!(&error, ClientError::Refused(body) if body.code == ErrorCode::NotFound);
        let error = CliError::from(error);
        if !is_not_found {
            return Err(error);
        }
        match self.find_by_prefix(typed).await {
            Ok(Some(Sandbox { id, name, .. })) => Err(error.hint(format!(
                "this command takes a name or a whole id; `{typed}` is a prefix of {id} ({name})"
            ))),
            Ok(None) | Err(_) => Err(error),
        }
    }

    /// Finds the only sandbox whose id begins with `typed`.
    async fn find_by_prefix(&self, typed: &str) -> Result<Option<Sandbox>, CliError> {
        if typed.len() < PREFIX_CHARS_MIN || !typed.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(None);
        }
        one_with_prefix(typed, self.client.list().await?)
    }
}

/// Returns the only sandbox whose id begins with `typed`; `None` if there is no such sandbox, or
/// if a sandbox has exactly that name or id.
fn one_with_prefix(typed: &str, sandboxes: Vec<Sandbox>) -> Result<Option<Sandbox>, CliError> {
    if sandboxes.iter().any(|sandbox| sandbox.name == typed || sandbox.id == typed) {
        return Ok(None);
    }
    let mut found: Vec<Sandbox> =
        sandboxes.into_iter().filter(|sandbox| sandbox.id.starts_with(typed)).collect();
    match found.len() {
        0 | 1 => Ok(found.pop()),
        _ => {
            let candidates: Vec<String> =
                found.iter().map(|sandbox| format!("{} ({})", sandbox.id, sandbox.name)).collect();
            Err(CliError::new(format!("`{typed}` is a prefix of several ids"))
                .hint(format!("name one of {}", candidates.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(id: &str, name: &str) -> Sandbox {
        let json = serde_json::json!({
            "id": id, "name": name, "status": "running", "cpus": 1, "memory_mb": 512, "env": {},
            "keep_hot": false, "labels": {}, "secrets": [], "image": "minimal", "network": "nat",
            "network_allow": [], "volumes": [], "created_by": "", "created_at": "", "origin": "boot",
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn unique_id_prefix_is_found_and_ambiguous_one_lists_the_candidates() {
        let all = || {
            vec![
                sandbox("abc1", "dev"),
                sandbox("abd2", "web"),
                sandbox("ffff", "other"),
                sandbox("0123", "ff"),
            ]
        };
        let found = |typed| {
            let found = one_with_prefix(typed, all()).map_err(|error| error.hint)?;
            Ok(found.map(|sandbox| sandbox.id))
        };

        assert_eq!(found("abc"), Ok(Some("abc1".to_owned())));
        assert_eq!(found("00"), Ok(None));
        assert_eq!(found("ff"), Ok(None), "a name takes precedence");
        assert_eq!(found("ab"), Err(Some("name one of abc1 (dev), abd2 (web)".to_owned())));
    }
}
