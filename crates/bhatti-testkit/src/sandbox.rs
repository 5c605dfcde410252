//! Helpers for sandboxes and their commands.

use bhatti_api::{CreateSandbox, ErrorCode, StreamRequest};
use bhatti_client::{Client, ClientError, CommandEvent, CommandOutput};
use tokio::time::timeout;

use crate::LIMIT;

/// Returns a create request with this name and no other options.
#[must_use]
pub fn named(name: &str) -> CreateSandbox {
    CreateSandbox { name: Some(name.to_owned()), ..CreateSandbox::default() }
}

/// Returns a request that starts a command.
#[must_use]
pub fn start(command: &[&str]) -> StreamRequest {
    let cmd = command.iter().map(|&argument| argument.to_owned()).collect();
    StreamRequest::Start {
        cmd,
        entrypoint: false,
        env: [].into(),
        cwd: None,
        user: None,
        timeout_sec: None,
    }
}

/// A command that has ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// The command's standard output.
    pub stdout: Vec<u8>,
    /// The command's standard error.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub code: i32,
}

/// Waits for the end of a command and collects its output.
///
/// # Errors
///
/// Returns the error that the daemon reports.
///
/// # Panics
///
/// Panics if neither output nor end comes within [`LIMIT`].
pub async fn collect(mut output: CommandOutput) -> Result<Ran, ClientError> {
    let mut ran = Ran::default();
    loop {
        match timeout(LIMIT, output.next()).await.expect("the command makes progress")? {
            CommandEvent::Stdout(bytes) => ran.stdout.extend_from_slice(&bytes),
            CommandEvent::Stderr(bytes) => ran.stderr.extend_from_slice(&bytes),
            CommandEvent::Exit(code) => {
                ran.code = code;
                return Ok(ran);
            }
        }
    }
}

/// Runs a command without input.
///
/// # Errors
///
/// Returns the error that the daemon reports.
pub async fn run(client: &Client, sandbox: &str, command: &[&str]) -> Result<Ran, ClientError> {
    let (mut input, output) = client.start_command(sandbox, &start(command)).await?;
    input.end().await?;
    collect(output).await
}

/// Runs a script that must succeed, and returns what it printed.
///
/// # Panics
///
/// Panics if the script fails.
pub async fn shell(client: &Client, sandbox: &str, script: &str) -> String {
    let ran = run(client, sandbox, &["sh", "-c", script]).await.expect("the command runs");
    assert_eq!(ran.code, 0, "{script}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).expect("text")
}

/// Returns the daemon's error code, if the daemon refused the request.
#[must_use]
pub fn code_of(error: &ClientError) -> Option<ErrorCode> {
    match error {
        ClientError::Refused(body) => Some(body.code),
        _ => None,
    }
}
