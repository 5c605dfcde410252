//! Commands.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ErrorCode;

/// The first byte of a binary WebSocket message of a streamed command. It names the stream that
/// the other bytes belong to.
pub mod channel {
    /// Client to server: standard input.
    pub const STDIN: u8 = 1;
    /// Server to client: standard output.
    pub const STDOUT: u8 = 2;
    /// Server to client: standard error.
    pub const STDERR: u8 = 3;
}

/// The exit code of a command that reached its time limit.
pub const TIMED_OUT: i32 = 124;

/// Runs a command, or starts a job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Command and arguments.
    #[serde(default)]
    pub cmd: Vec<String>,
    /// Whether to run the image's entrypoint with `cmd` as its arguments, or with the image's own
    /// arguments if `cmd` is empty.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub entrypoint: bool,
    /// Variables added to the sandbox's environment, which they override.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory [default: that of the image, or `/workspace`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Standard input, as text [default: empty].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Standard input as base64 with padding (RFC 4648, section 4), in place of `stdin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// User to run as: a name, a number, or `UID:GID` [default: that of the image, or the sandbox's
    /// usual user].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Seconds after which the command is ended [default: never]. Its exit code is then 124; that
    /// of a job is 128 plus the signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub timeout_sec: Option<u32>,
    /// Whether to run the command as a job, which needs no client.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detach: bool,
    /// Whether the job restarts at each boot of the sandbox, until it has ended. Until then, its
    /// command and variables are kept in a file inside the sandbox that only root can read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
}

/// A job: a command that runs, or ran, without a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Job id.
    pub id: String,
    /// Command, joined by single spaces. A long one is cut and ends with `…`.
    pub cmd: String,
    /// Whether the job runs.
    pub running: bool,
    /// Exit code, once the job has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Start time (RFC 3339).
    pub created_at: String,
    /// Offset of the first output byte that is kept.
    pub output_start: u64,
    /// Offset after the last output byte so far.
    pub output_end: u64,
    /// Whether the job restarts at each boot of the sandbox.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
}

/// A terminal session, or a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Session id.
    pub session_id: String,
    /// Command, joined by single spaces. A long one is cut and ends with `…`.
    pub argv: String,
    /// Whether the session has a terminal.
    pub tty: bool,
    /// Whether the process runs.
    pub running: bool,
    /// Exit code, once the process has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Whether a client is attached.
    pub attached: bool,
    /// Creation time (RFC 3339).
    pub created_at: String,
}

/// Text messages from the client on the WebSocket of a shell. Every other message, text or
/// binary, is keyboard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ShellRequest {
    /// Resizes the terminal.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        cols: u16,
    },
}

/// Text messages from the server on the WebSocket of a shell. Output travels in binary messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ShellServerMessage {
    /// The client is attached. This message comes first.
    Session {
        /// Session id, for attaching again.
        session_id: String,
        /// Whether the session is new.
        new: bool,
    },
    /// The session ended. Nothing follows.
    Exit {
        /// Exit code; 128 plus the signal if a signal ended the process; 124 after `timeout_sec`.
        exit_code: i32,
    },
    /// The session does not exist, or was lost. Nothing follows.
    Error {
        /// Error text, for people.
        error: String,
        /// Error code, for programs.
        code: ErrorCode,
        /// How to fix the problem.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

/// Output bytes of a command. JSON holds text only, so bytes that are not UTF-8 appear twice: as
/// readable text, and exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The bytes as text, with U+FFFD for bytes that are not UTF-8.
    pub text: String,
    /// The bytes in base64, if `text` does not equal them.
    pub base64: Option<String>,
}

impl Output {
    /// Wraps bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        match String::from_utf8(bytes) {
            Ok(text) => Self { text, base64: None },
            Err(error) => {
                let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
                Self { text, base64: Some(STANDARD.encode(error.as_bytes())) }
            }
        }
    }

    /// Returns the bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        match self.base64.and_then(|encoded| STANDARD.decode(encoded).ok()) {
            Some(bytes) => bytes,
            None => self.text.into_bytes(),
        }
    }
}

/// Result of a command, with its whole output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// Exit code; 128 plus the signal if a signal ended the command; 124 after `timeout_sec`.
    pub exit_code: i32,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text.
    pub stderr: String,
    /// Standard output in base64, if it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// Standard error in base64, if it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
}

/// A line of a streamed command's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecEvent {
    /// The command wrote to standard output.
    Stdout {
        /// Output as text.
        data: String,
        /// Output in base64, if it is not UTF-8.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data_base64: Option<String>,
    },
    /// The command wrote to standard error.
    Stderr {
        /// Output as text.
        data: String,
        /// Output in base64, if it is not UTF-8.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data_base64: Option<String>,
    },
    /// The command ended. Nothing follows.
    Exit {
        /// Exit code; 128 plus the signal if a signal ended the command; 124 after `timeout_sec`.
        exit_code: i32,
    },
    /// The command could not be started, or was lost. Nothing follows.
    Error {
        /// Error text, for people.
        data: String,
        /// Error code, for programs.
        code: ErrorCode,
    },
}

/// Bytes of standard input that a client may have sent without an acknowledgment. A client that
/// stays within this window never waits in the middle of a message, so it can always send a
/// signal. The number is published in [`StreamServerMessage::StdinAck`].
pub const STDIN_WINDOW_BYTES: u64 = 1 << 20;

/// Text messages from the client on the WebSocket of a streamed command. The first message is of
/// type `start`. Standard input travels in binary messages whose first byte is 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum StreamRequest {
    /// Starts the command.
    Start {
        /// Command and arguments.
        cmd: Vec<String>,
        /// Whether to run the image's entrypoint with `cmd` as its arguments, or with the image's
        /// own arguments if `cmd` is empty.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        entrypoint: bool,
        /// Variables added to the sandbox's environment, which they override.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        env: BTreeMap<String, String>,
        /// Working directory [default: that of the image, or `/workspace`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cwd: Option<String>,
        /// User to run as: a name, a number, or `UID:GID` [default: that of the image, or the
        /// sandbox's usual user].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
        /// Seconds after which the command is ended, with exit code 124 [default: never].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_sec: Option<u32>,
    },
    /// Ends standard input.
    StdinEof,
    /// Signals the command's process group.
    Signal {
        /// Number of the signal.
        signal: u8,
    },
}

/// Text messages from the server on the WebSocket of a streamed command. Output travels in binary
/// messages, whose first byte is 2 for standard output and 3 for standard error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamServerMessage {
    /// Acknowledges further bytes of standard input. A client may send at most 1 MiB without an
    /// acknowledgment.
    StdinAck {
        /// Number of bytes.
        bytes: u64,
    },
    /// The command ended. Nothing follows.
    Exit {
        /// Exit code; 128 plus the signal if a signal ended the command; 124 after `timeout_sec`.
        exit_code: i32,
    },
    /// The command could not be started, or was lost. Nothing follows.
    Error {
        /// Error text, for people.
        error: String,
        /// Error code, for programs.
        code: ErrorCode,
        /// How to fix the problem.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_json() {
        let bytes: Vec<u8> = (0..=255).collect();

        let output = Output::new(bytes.clone());

        assert!(output.text.contains('\u{fffd}'));
        assert_eq!(output.into_bytes(), bytes);
    }

    #[test]
    fn text_needs_no_base64() {
        assert_eq!(Output::new("é".into()), Output { text: "é".into(), base64: None });
    }

    #[test]
    fn unknown_field_of_a_request_is_refused() {
        assert!(serde_json::from_str::<ExecRequest>(r#"{"cmd":["true"],"tty":true}"#).is_err());
        assert!(
            serde_json::from_str::<StreamRequest>(r#"{"type":"start","cmd":[],"x":1}"#).is_err()
        );
    }
}
