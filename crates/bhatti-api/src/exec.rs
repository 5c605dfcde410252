//! Commands.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ErrorCode;

/// The first byte of a binary WebSocket message of a streamed command: which stream the rest belongs to.
pub mod channel {
    /// Client to server: standard input.
    pub const STDIN: u8 = 1;
    /// Server to client: standard output.
    pub const STDOUT: u8 = 2;
    /// Server to client: standard error.
    pub const STDERR: u8 = 3;
}

/// The exit code of a command whose time was over.
pub const TIMED_OUT: i32 = 124;

/// Runs a command and waits for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The command and its arguments.
    #[serde(default)]
    pub cmd: Vec<String>,
    /// Variables laid over the sandbox's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/workspace` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Standard input; empty if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Standard input that need not be text, as base64 with padding (RFC 4648, 4), instead of `stdin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// Who it runs as, a name or a number; the image's usual user if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Seconds after which it is ended; never if absent. Its exit code is then 124, that of a job 128 plus the signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<u32>,
    /// Whether it is a job, which runs on without a client.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detach: bool,
    /// Whether a job starts again each time that the sandbox boots anew, until it has ended. Its command and variables lie in a file of
    /// root's in the sandbox meanwhile.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
}

/// A command that runs, or ran, without a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// The command, joined by single spaces. Of a long one, its beginning and `…`.
    pub cmd: String,
    /// Whether it runs.
    pub running: bool,
    /// Its exit code, once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// When it was started, in seconds since 1970.
    pub created_at: i64,
    /// The first byte of its output that is kept.
    pub output_start: u64,
    /// The byte behind the last one of its output so far.
    pub output_end: u64,
    /// Whether it starts again each time that the sandbox boots anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
}

/// A terminal session, or a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
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

/// Text messages from the client on the WebSocket of a shell. Every other message, text or binary, is what was typed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ShellRequest {
    /// Its window has another size.
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
    /// The client is attached. Comes first.
    Session {
        /// To come back to it.
        session_id: String,
        /// Whether it was made just now.
        new: bool,
    },
    /// The session ended. Nothing follows.
    Exit {
        /// Its exit code; 128 plus the signal that ended it.
        exit_code: i32,
    },
    /// There is no session, or it was lost. Nothing follows.
    Error {
        /// For a person.
        error: String,
        /// For a program.
        code: ErrorCode,
        /// What to do about it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

/// Bytes that a command wrote. JSON holds text only, so what is not UTF-8 comes twice: readable, and exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The bytes as text; U+FFFD stands for what is none.
    pub text: String,
    /// The bytes in base64, if the text is not exactly them.
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

    /// The bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        match self.base64.and_then(|encoded| STANDARD.decode(encoded).ok()) {
            Some(bytes) => bytes,
            None => self.text.into_bytes(),
        }
    }
}

/// How a command ended, with all that it wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    /// Its exit code; 128 plus the signal that ended it.
    pub exit_code: i32,
    /// What it wrote to standard output, as text.
    pub stdout: String,
    /// What it wrote to standard error, as text.
    pub stderr: String,
    /// Standard output in base64, if it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// Standard error in base64, if it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
}

/// One line of a streamed command's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecEvent {
    /// It wrote to standard output.
    Stdout {
        /// As text.
        data: String,
        /// In base64, if it is not UTF-8.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data_base64: Option<String>,
    },
    /// It wrote to standard error.
    Stderr {
        /// As text.
        data: String,
        /// In base64, if it is not UTF-8.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data_base64: Option<String>,
    },
    /// It ended. Nothing follows.
    Exit {
        /// Its exit code; 128 plus the signal that ended it.
        exit_code: i32,
    },
    /// It could not be started, or was lost. Nothing follows.
    Error {
        /// For a person.
        data: String,
        /// For a program.
        code: ErrorCode,
    },
}

/// Bytes of standard input that a client may have sent and not yet had acknowledged. Who keeps to it is never made to wait with a
/// message half sent, and so can always send a signal.
pub const STDIN_WINDOW_BYTES: u64 = 1 << 20;

/// Text messages from the client on the WebSocket of a streamed command. The first one is `Start`; standard input travels in binary
/// messages, see [`channel`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum StreamRequest {
    /// Starts the command.
    Start {
        /// The command and its arguments.
        cmd: Vec<String>,
        /// Variables laid over the sandbox's environment.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        env: BTreeMap<String, String>,
        /// Working directory; `/workspace` if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cwd: Option<String>,
        /// Who it runs as, a name or a number; the image's usual user if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
        /// Seconds after which it is ended, its exit code 124; never if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_sec: Option<u32>,
    },
    /// Ends standard input.
    StdinEof,
    /// Signals the command's process group.
    Signal {
        /// The signal's number.
        signal: u8,
    },
}

/// Text messages from the server on the WebSocket of a streamed command. Output travels in binary messages, see [`channel`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamServerMessage {
    /// The command's side has taken so many more bytes of standard input: see [`STDIN_WINDOW_BYTES`].
    StdinAck {
        /// How many.
        bytes: u64,
    },
    /// The command ended. Nothing follows.
    Exit {
        /// Its exit code; 128 plus the signal that ended it.
        exit_code: i32,
    },
    /// It could not be started, or was lost. Nothing follows.
    Error {
        /// For a person.
        error: String,
        /// For a program.
        code: ErrorCode,
        /// What to do about it.
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
    fn text_needs_no_second_form() {
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
