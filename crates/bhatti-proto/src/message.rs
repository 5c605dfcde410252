//! The JSON messages that frames carry.
//!
//! Keys, their order and their absence are the original's. Keys marked *optional, new* were added since; an old peer ignores them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

fn is_false(value: &bool) -> bool {
    !value
}

fn is_zero(value: &i64) -> bool {
    *value == 0
}

/// Starts a process, or attaches to a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The command and its arguments. Ignored when `session_id` is present.
    #[serde(default)]
    pub argv: Vec<String>,
    /// Variables laid over the default environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Whether the process gets a terminal, and so a session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<bool>,
    /// Rows of the terminal; 24 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u16>,
    /// Columns of the terminal; 80 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cols: Option<u16>,
    /// Working directory; the agent's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The session to attach to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    /// Seconds after which a detached session is killed; never if absent or not positive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_idle_sec: Option<i64>,
    /// Whether a failed start is answered by [`START_ERROR`](crate::FrameType::START_ERROR). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Why a process could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartErrorKind {
    /// There is no such program.
    NotFound,
    /// The program may not be executed.
    NotExecutable,
    /// The working directory cannot be entered.
    BadCwd,
    /// The request makes no sense.
    BadRequest,
    /// The guest could not do it.
    Other,
}

/// A process could not be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartError {
    /// Why.
    pub kind: StartErrorKind,
    /// The text that [`ERROR`](crate::FrameType::ERROR) would have carried.
    pub message: String,
}

/// A session, as listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Its id.
    pub session_id: String,
    /// Its command, joined by single spaces.
    pub argv: String,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether its process runs.
    pub running: bool,
    /// The exit code, once the process has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Whether a client is attached.
    pub attached: bool,
    /// When it was created, in seconds since 1970.
    pub created_at: i64,
}

/// Names a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRef {
    /// Its id.
    pub session_id: String,
}

/// What happened in the guest lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivityInfo {
    /// The last activity, in seconds since 1970; 0 if there was none.
    pub last_activity_unix: i64,
    /// Sessions whose process runs.
    pub active_sessions: u32,
    /// Sessions with a client.
    pub attached_sessions: u32,
}

/// Connects to a TCP port of the guest's loopback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRequest {
    /// The port.
    pub port: u16,
}

/// Answers a [`ForwardRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardResponse {
    /// `ok` or `error`.
    pub status: String,
    /// The error's text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// A file or directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Its base name.
    pub name: String,
    /// Its size in bytes.
    pub size: i64,
    /// Its permission bits as four octal digits.
    pub mode: String,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Its modification time, in seconds since 1970.
    pub mtime: i64,
}

/// Reads a file, or the part of it that `offset`, `limit` and `max_bytes` leave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReadRequest {
    /// The file.
    pub path: String,
    /// The first line, counted from 1; 0 means 1.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub offset: i64,
    /// The most lines; 0 means all.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub limit: i64,
    /// The most bytes; 0 means all.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub max_bytes: i64,
}

/// Answers a [`FileReadRequest`]; the content follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReadResponse {
    /// The permission bits as four octal digits.
    pub mode: String,
    /// The size of the whole file, in bytes.
    pub size: i64,
}

/// Writes a file; the content follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWriteRequest {
    /// The file.
    pub path: String,
    /// The permission bits in octal.
    #[serde(default)]
    pub mode: String,
    /// The size of the content, in bytes.
    pub size: i64,
}

/// Asks about a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePathRequest {
    /// The path.
    pub path: String,
}

/// Says that it was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusOk {
    /// Always `ok`.
    pub status: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_request_is_the_originals() {
        let request =
            ExecRequest { argv: vec!["echo".into(), "hi".into()], ..ExecRequest::default() };

        assert_eq!(serde_json::to_string(&request).unwrap(), r#"{"argv":["echo","hi"]}"#);
    }

    #[test]
    fn every_key_of_a_request_survives() {
        let request = ExecRequest {
            argv: vec!["sh".into()],
            env: BTreeMap::from([("K".into(), "V".into())]),
            tty: Some(true),
            rows: Some(40),
            cols: Some(120),
            cwd: Some("/tmp".into()),
            session_id: Some(String::new()),
            max_idle_sec: Some(60),
            error_details: true,
        };

        let json = serde_json::to_string(&request).unwrap();

        assert_eq!(serde_json::from_str::<ExecRequest>(&json).unwrap(), request);
    }

    #[test]
    fn exit_code_is_absent_while_running_and_zero_is_present() {
        let mut session = SessionInfo {
            session_id: "s1".into(),
            argv: "cat".into(),
            tty: true,
            running: true,
            exit_code: None,
            attached: true,
            created_at: 1,
        };
        let running = serde_json::to_string(&session).unwrap();
        session.exit_code = Some(0);
        let ended = serde_json::to_string(&session).unwrap();

        let head = r#"{"session_id":"s1","argv":"cat","tty":true,"running":true,"#;
        assert_eq!(running, format!(r#"{head}"attached":true,"created_at":1}}"#));
        assert_eq!(ended, format!(r#"{head}"exit_code":0,"attached":true,"created_at":1}}"#));
    }

    #[test]
    fn zero_limits_of_a_read_are_absent() {
        let request = FileReadRequest { path: "/a".into(), ..FileReadRequest::default() };

        assert_eq!(serde_json::to_string(&request).unwrap(), r#"{"path":"/a"}"#);
    }
}
