//! The JSON messages that frames carry.
//!
//! Keys, their order, and which of them are left out are the original system's. Keys marked
//! *optional, new* were added since; an old peer ignores them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::entry::InPlace;
use crate::is_false;

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Starts a process, or attaches to a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The command and its arguments. Ignored when `session_id` is present.
    #[serde(default)]
    pub argv: Vec<String>,
    /// Variables added to the default environment, which they override.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Whether the process gets a terminal, and with it a session.
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
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
    /// The user that the process runs as: a name, a number, or `UID:GID`; the guest's usual user
    /// if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Milliseconds after which the agent ends the process group; never if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// The name that the host gives this command, for [`SignalRequest`]. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<String>,
    /// Whether a process without a terminal also gets a session. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub session: bool,
    /// Whether to answer with [`SessionInfo`] alone and to run the session without a client.
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub detach: bool,
    /// When attaching: the byte of the output to start from; the first byte that is kept if
    /// absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_offset: Option<u64>,
    /// When attaching to a job: whether to follow its output beside its client rather than to
    /// replace that client. If output is dropped before it was sent, the agent ends the stream
    /// with an error. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub observe: bool,
    /// Bytes of output that a session without a terminal keeps; the agent's default if absent.
    /// Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit: Option<u64>,
    /// Whether a detached job restarts at each boot of the guest until it has ended. Optional,
    /// new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub restart: bool,
    /// The signal that asks the session to end, as its number; `SIGTERM` if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<u8>,
    /// Whether the working directory is the user's home if neither the request nor the settings
    /// name one, and whether a relative one begins there. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub at_home: bool,
    /// A second name of the new session: see [`SessionInfo::tag`]. At most 256 bytes. Optional,
    /// new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// See [`SessionInfo::note`]. At most 4 KiB. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// When attaching: whether this connection only brings input, beside the session's client. The
    /// input ends with [`STDIN_EOF`](crate::FrameType::STDIN_EOF), and the agent answers with
    /// [`EXIT`](crate::FrameType::EXIT) 0 when it has taken all of it. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<InputEnd>,
}

/// What the end of a connection's input means for the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputEnd {
    /// More input may come on other connections.
    Continue,
    /// The session's standard input is closed.
    Close,
}

/// Selects what a list of sessions has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListRequest {
    /// Whether the sessions have their tags and notes. The list then comes in as many frames as it
    /// needs, followed by [`EXIT`](crate::FrameType::EXIT).
    #[serde(default, skip_serializing_if = "is_false")]
    pub in_full: bool,
}

/// The reason for a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The program, file or directory does not exist.
    NotFound,
    /// The program is not executable.
    NotExecutable,
    /// The working directory cannot be entered.
    BadCwd,
    /// The request is invalid.
    BadRequest,
    /// The user does not exist.
    NoSuchUser,
    /// The session or command does not exist.
    NoSuchSession,
    /// The path is a directory, but must not be.
    IsDirectory,
    /// The path is not a directory, but must be.
    NotDirectory,
    /// The path is a pipe, socket or device.
    NotRegular,
    /// The path exists, but must not.
    AlreadyExists,
    /// The directory is not empty.
    NotEmpty,
    /// The guest's kernel does not permit the operation.
    PermissionDenied,
    /// The guest's disk is full.
    NoSpace,
    /// The content exceeds the agent's limit. New.
    TooLarge,
    /// A limit of the agent is reached.
    Limit,
    /// The connection did not authenticate.
    Unauthorized,
    /// The operation failed in the guest.
    Other,
}

/// A request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentError {
    /// The reason.
    pub kind: ErrorKind,
    /// The text that [`ERROR`](crate::FrameType::ERROR) would have carried.
    pub message: String,
}

/// A session, as the agent lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// The session's id.
    pub session_id: String,
    /// The command, joined by single spaces. A long one is cut and ends with `…`.
    pub argv: String,
    /// Whether the session has a terminal.
    pub tty: bool,
    /// Whether the process runs.
    pub running: bool,
    /// The exit code, once the process has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Whether a client is attached.
    pub attached: bool,
    /// The creation time, in seconds since 1970.
    pub created_at: i64,
    /// The offset of the first output byte that is kept. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_start: Option<u64>,
    /// The offset after the last output byte so far. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_end: Option<u64>,
    /// Whether the session is a job that restarts at each boot of the guest. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub restart: bool,
    /// The process id of the command in the guest. While the command runs, `pid:` and this number
    /// also name the session. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// A name that the host has given: `tag:` and this text also name the session. If several
    /// sessions have it, the newest that runs is meant. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Text that the host has given, which the agent keeps for it. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Names a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRef {
    /// The session's id.
    pub session_id: String,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// The recent activity in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivityInfo {
    /// The last activity, in seconds since 1970; 0 if there was none.
    pub last_activity_unix: i64,
    /// Sessions whose process runs.
    pub active_sessions: u32,
    /// Sessions with an attached client.
    pub attached_sessions: u32,
    /// Running commands without a session, and running sessions without a terminal. Optional,
    /// new.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub running_jobs: u32,
}

/// The resources that the guest uses, as its kernel counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadInfo {
    /// The number of CPUs.
    pub cpus: u32,
    /// The use of all CPUs since the last such request, or since the boot, in hundredths of a
    /// percent: 10000 if all were busy.
    pub cpu_used: u32,
    /// The memory, in bytes.
    pub memory: u64,
    /// The memory that is not available to new programs, in bytes.
    pub memory_used: u64,
    /// The memory that caches files, in bytes.
    pub memory_cache: u64,
    /// The size of the root disk, in bytes.
    pub disk: u64,
    /// The part of it that is in use, in bytes.
    pub disk_used: u64,
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
    /// The signal's number; 0 is the signal that asks the session to end.
    pub signal: u8,
    /// Milliseconds after which the agent kills what is left of the session; never if absent.
    /// Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kill_after_ms: Option<u64>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// An event in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GuestEvent {
    /// The kernel killed a process because memory ran out.
    OomKill {
        /// The process id.
        pid: u32,
        /// The process's name.
        name: String,
        /// The process's cgroup, as a path in the guest's tree. Optional, new.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cgroup: Option<String>,
    },
}

/// Connects to a TCP port of the guest's loopback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRequest {
    /// The port.
    pub port: u16,
    /// Whether the connection is relayed as frames, see
    /// [`relay_as_frames`](crate::relay_as_frames). Optional, new.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub framed: bool,
}

/// Answers a [`ForwardRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardResponse {
    /// `ok` or `error`.
    pub status: String,
    /// The error text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Whether the connection is relayed as frames, as the request asked. Optional, new.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub framed: bool,
}

/// A file or directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// The base name.
    pub name: String,
    /// The size in bytes.
    pub size: i64,
    /// The permission bits as four octal digits.
    pub mode: String,
    /// Whether the entry is a directory.
    pub is_dir: bool,
    /// The modification time, in seconds since 1970.
    pub mtime: i64,
    /// The target, if the entry is a symbolic link. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// Reads a file, or the part that `offset`, `limit` and `max_bytes` select.
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
    /// The user that the operation acts as: a name, a number, or `UID:GID`; the guest's usual
    /// user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
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
    /// The permission bits in octal. If empty, those of the existing file, else 0644.
    #[serde(default)]
    pub mode: String,
    /// The size of the content, in bytes; -1 if unknown.
    pub size: i64,
    /// Whether the content has no known size and ends with
    /// [`STDIN_EOF`](crate::FrameType::STDIN_EOF). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub until_eof: bool,
    /// Whether the file is part of the guest's configuration: the agent writes it with its own
    /// rights, and new files and directories belong to the guest's usual user. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub configures: bool,
    /// Whether the file is written in place, by the agent with its own rights. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place: Option<InPlace>,
    /// The user that the operation acts as: a name, a number, or `UID:GID`; the guest's usual
    /// user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Names a path to stat, list or watch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePathRequest {
    /// The path.
    pub path: String,
    /// When listing: whether the agent sends all entries, in as many frames as needed, followed
    /// by [`EXIT`](crate::FrameType::EXIT). Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub all: bool,
    /// The user that the operation acts as: a name, a number, or `UID:GID`; the guest's usual
    /// user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Creates a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MkdirRequest {
    /// The directory.
    pub path: String,
    /// The permission bits in octal; 0755 if empty.
    #[serde(default)]
    pub mode: String,
    /// Whether to create missing parents, and to accept an existing directory.
    #[serde(default, skip_serializing_if = "is_false")]
    pub parents: bool,
    /// The owner of new directories, as in [`Place::ids`](crate::Place::ids). The agent then makes
    /// them with its own rights. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The user that the operation acts as: a name, a number, or `UID:GID`; the guest's usual
    /// user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Removes a file or directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveRequest {
    /// The file or directory.
    pub path: String,
    /// Whether to remove a directory with its contents.
    #[serde(default, skip_serializing_if = "is_false")]
    pub recursive: bool,
    /// The user that the operation acts as: a name, a number, or `UID:GID`; the guest's usual
    /// user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Renames a file or directory, and replaces the target as rename(2) does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenameRequest {
    /// The old path.
    pub from: String,
    /// The new path.
    pub to: String,
    /// The user that the operation acts as: a name, a number, or `UID:GID`; the guest's usual
    /// user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    /// Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// Reads a directory as a tar archive, or unpacks an archive into a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveRequest {
    /// The directory.
    pub path: String,
    /// Whether the archive is to become an image: it has extended attributes and pipes, and nothing
    /// of other file systems or of the agent. Optional, new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub image: bool,
    /// The user that the operation acts as: a name, a number, or `UID:GID`; the guest's usual
    /// user if absent. Optional, new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// The kind of an event on a watched file, or on an entry of a watched directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileEventKind {
    /// The watch is active: later changes are reported.
    Watching,
    /// The entry was created, or moved here.
    Created,
    /// The content was changed.
    Modified,
    /// The attributes were changed.
    Attributes,
    /// The entry was removed, or moved away.
    Removed,
    /// The entry was moved away. Only watches of trees tell it from a removal.
    Moved,
    /// Events were lost: read the path again.
    Overflow,
}

/// An event on a watched path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEvent {
    /// The kind of event.
    pub kind: FileEventKind,
    /// The entry of the watched directory; absent if the event is on the watched path itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Reports success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusOk {
    /// Always `ok`.
    pub status: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_request_matches_the_original() {
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
            stop_signal: Some(2),
            at_home: true,
            tag: Some("t".into()),
            note: Some("n".into()),
            input: Some(InputEnd::Close),
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
            pid: None,
            tag: None,
            note: None,
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
