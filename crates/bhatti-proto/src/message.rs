//! The JSON messages that frames carry.
//!
//! Keys, their order and their absence are the original's. Keys marked *optional, new* were added since; an old peer ignores them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub(crate) fn is_false(value: &bool) -> bool {
    !value
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
    /// Who the process runs as, a name or a number; the guest's usual user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Milliseconds after which the process group is ended; never if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// A name that the host gives this command, for [`SignalRequest`]. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<String>,
    /// Whether a process without a terminal gets a session, too. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub session: bool,
    /// Whether to answer with [`SessionInfo`] alone and leave the session to itself. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub detach: bool,
    /// When attaching: the byte of the output to go on from; all that is kept if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_offset: Option<u64>,
    /// When attaching to a job: whether to follow its output beside its client, whoever that is, rather than to take its place. Output
    /// that is pushed out before it was sent is left out. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub observe: bool,
    /// Bytes of output that a session without a terminal keeps; the agent's default if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit: Option<u64>,
    /// Whether a detached job starts again each time that the guest boots anew, until it has ended. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub restart: bool,
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// There is no such program, file or directory.
    NotFound,
    /// The program may not be executed.
    NotExecutable,
    /// The working directory cannot be entered.
    BadCwd,
    /// The request makes no sense.
    BadRequest,
    /// There is no such user.
    NoSuchUser,
    /// There is no such session or command.
    NoSuchSession,
    /// The path is a directory, and must not be.
    IsDirectory,
    /// The path is no directory, and must be.
    NotDirectory,
    /// The path is a pipe, socket or device.
    NotRegular,
    /// The path exists, and must not.
    AlreadyExists,
    /// The directory is not empty.
    NotEmpty,
    /// The guest's kernel does not permit it.
    PermissionDenied,
    /// The guest's disk is full.
    NoSpace,
    /// The content is larger than the agent takes. New.
    TooLarge,
    /// A limit of the agent is reached.
    Limit,
    /// The connection did not authenticate.
    Unauthorized,
    /// The guest could not do it.
    Other,
}

/// A request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentError {
    /// Why.
    pub kind: ErrorKind,
    /// The text that [`ERROR`](crate::FrameType::ERROR) would have carried.
    pub message: String,
}

/// A session, as listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Its id.
    pub session_id: String,
    /// Its command, joined by single spaces. Of a long one, its beginning and `…`.
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
    /// The first byte of the output that is kept. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_start: Option<u64>,
    /// The byte behind the last one of the output so far. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_end: Option<u64>,
    /// Whether it is a job that starts again when the guest boots anew. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub restart: bool,
}

/// Names a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRef {
    /// Its id.
    pub session_id: String,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
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
    /// Commands that run without a session, and sessions without a terminal whose process runs. Optional, new.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub running_jobs: u32,
}

/// Signals a command or session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalRequest {
    /// The command, by the name that the host gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<String>,
    /// The session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    /// The signal's number.
    pub signal: u8,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Something that happened in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GuestEvent {
    /// The kernel killed a process for want of memory.
    OomKill {
        /// The process's number.
        pid: u32,
        /// The process's name.
        name: String,
        /// The cgroup that it was in, as a path in the guest's tree. Optional, new.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cgroup: Option<String>,
    },
}

/// Connects to a TCP port of the guest's loopback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRequest {
    /// The port.
    pub port: u16,
    /// Whether what follows travels as frames, see [`relay_as_frames`](crate::relay_as_frames). Optional, new.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub framed: bool,
}

/// Answers a [`ForwardRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardResponse {
    /// `ok` or `error`.
    pub status: String,
    /// The error's text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Whether what follows travels as frames, as it was asked to. Optional, new.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub framed: bool,
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
    /// Where it leads, if it is a symbolic link. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
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
    /// The user that the operation acts as, a name or a number; the guest's usual user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
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
    /// The permission bits in octal. If empty, those of the file that is there, or 0644.
    #[serde(default)]
    pub mode: String,
    /// The size of the content, in bytes; -1 if it is unknown.
    pub size: i64,
    /// Whether the content ends with [`STDIN_EOF`](crate::FrameType::STDIN_EOF), its size being unknown. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub until_eof: bool,
    /// Whether the file is part of the guest's configuration: the agent writes it with its own
    /// rights, and what is new belongs to the guest's usual user. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub configures: bool,
    /// The user that the operation acts as, a name or a number; the guest's usual user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Asks about a path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePathRequest {
    /// The path.
    pub path: String,
    /// When listing: whether all entries come, in as many frames as it takes, and [`EXIT`](crate::FrameType::EXIT) behind them.
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub all: bool,
    /// The user that the operation acts as, a name or a number; the guest's usual user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Makes a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MkdirRequest {
    /// The directory.
    pub path: String,
    /// The permission bits in octal; 0755 if empty.
    #[serde(default)]
    pub mode: String,
    /// Whether its parents are made, too, and it may exist already.
    #[serde(default, skip_serializing_if = "is_false")]
    pub parents: bool,
    /// The user that the operation acts as, a name or a number; the guest's usual user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Removes a file or directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveRequest {
    /// The file or directory.
    pub path: String,
    /// Whether a directory goes with all that is in it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub recursive: bool,
    /// The user that the operation acts as, a name or a number; the guest's usual user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Renames a file or directory, replacing what a rename replaces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenameRequest {
    /// Its path.
    pub from: String,
    /// Its new path.
    pub to: String,
    /// The user that the operation acts as, a name or a number; the guest's usual user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Reads a directory as a tar archive, or unpacks one into a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveRequest {
    /// The directory.
    pub path: String,
    /// The user that the operation acts as, a name or a number; the guest's usual user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// What happened to a watched file, or to an entry of a watched directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileEventKind {
    /// The watch stands: what happens from now on is told.
    Watching,
    /// It was made, or moved here.
    Created,
    /// Its content was changed.
    Modified,
    /// Its attributes were changed.
    Attributes,
    /// It was removed, or moved away.
    Removed,
    /// Events were lost: look for yourself.
    Overflow,
}

/// Something that happened to a watched path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEvent {
    /// What happened.
    pub kind: FileEventKind,
    /// The entry of the watched directory; absent if it is the watched path itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
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
            user: Some("root".into()),
            timeout_ms: Some(5),
            exec_id: Some("e".into()),
            session: true,
            detach: true,
            output_offset: Some(0),
            observe: true,
            output_limit: Some(1),
            restart: true,
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
            output_start: None,
            output_end: None,
            restart: false,
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
