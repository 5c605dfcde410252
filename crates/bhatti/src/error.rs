//! Errors of commands: message, hint and exit code.

use std::error::Error;
use std::io;

use bhatti_api::ErrorCode;
use bhatti_client::{ClientError, ConnectError};
use bhatti_types::Report;

/// Exit code of a command that failed.
const EXIT_FAILED: u8 = 1;
/// Exit codes of a command that the daemon refused: the caller may not do it, or the thing does not
/// exist.
const EXIT_DENIED: u8 = 4;
const EXIT_MISSING: u8 = 5;
/// Exit codes of `exec` if the command itself has none, as in shells and container tools.
pub(crate) const EXIT_OURS: u8 = 125;
const EXIT_NOT_EXECUTABLE: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;
/// 128 plus SIGPIPE: the reader of the output is gone.
const EXIT_PIPE: u8 = 141;

/// A command failed.
#[derive(Debug)]
pub(crate) struct CliError {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    pub(crate) code: Option<ErrorCode>,
    pub(crate) exit: u8,
    is_interrupted: bool,
    is_lost: bool,
}

impl CliError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            code: None,
            exit: EXIT_FAILED,
            is_interrupted: false,
            is_lost: false,
        }
    }

    /// Creates an error from `error` and all its causes.
    pub(crate) fn of(error: &dyn Error) -> Self {
        Self::new(Report(error).to_string())
    }

    /// Creates the error of a command that a signal has ended.
    pub(crate) fn interrupted(signal: u8) -> Self {
        Self { exit: 128 + signal, is_interrupted: true, ..Self::new("interrupted") }
            .hint("the command in the sandbox ends when the disconnect is noticed")
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Returns whether the daemon, or the connection to it, was lost.
    pub(crate) const fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Returns the same error with the exit code that `exec` uses for it.
    pub(crate) fn of_exec(self) -> Self {
        let exit = match self.code {
            Some(ErrorCode::CommandNotFound) => EXIT_NOT_FOUND,
            Some(ErrorCode::CommandNotExecutable) => EXIT_NOT_EXECUTABLE,
            _ if self.exit == EXIT_PIPE || self.is_interrupted => self.exit,
            _ => EXIT_OURS,
        };
        Self { exit, ..self }
    }

    /// Returns whether the error is not printed, because the reader is gone.
    pub(crate) const fn is_silent(&self) -> bool {
        self.exit == EXIT_PIPE
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let ours = Self::of(&error);
        match error {
            ClientError::Refused(body) => {
                let exit = match body.code {
                    ErrorCode::Unauthorized | ErrorCode::Forbidden => EXIT_DENIED,
                    ErrorCode::NotFound => EXIT_MISSING,
                    _ => EXIT_FAILED,
                };
                Self { hint: body.hint, code: Some(body.code), exit, ..ours }
            }
            ClientError::Connect(error) => ours.hint(match *error {
                ConnectError::Tls { .. } => {
                    "the certificate must be for this name, and from an authority that this machine trusts: SSL_CERT_FILE names a file with further ones"
                }
                ConnectError::Unix { .. } | ConnectError::Tcp { .. } => {
                    "start it with `bhatti serve`, or name another with --data-dir or --url"
                }
            }),
            ClientError::Lost(_) | ClientError::StreamLost(_) => Self { is_lost: true, ..ours },
            ClientError::Archive(_) | ClientError::Unexpected(_) => ours,
        }
    }
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> Self {
        let exit = if error.kind() == io::ErrorKind::BrokenPipe { EXIT_PIPE } else { EXIT_FAILED };
        Self { exit, ..Self::of(&error) }
    }
}
