//! Commands.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

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

/// Runs a command and waits for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
