//! What tests do with sandboxes.

use bhatti_api::{CreateSandbox, ErrorCode, StreamRequest};
use bhatti_client::{Client, ClientError, CommandEvent, CommandOutput};
use tokio::time::timeout;

use crate::LIMIT;

/// A sandbox of this name, with nothing else asked for.
#[must_use]
pub fn named(name: &str) -> CreateSandbox {
    CreateSandbox { name: Some(name.to_owned()), ..CreateSandbox::default() }
}

/// Starts a command.
#[must_use]
pub fn start(command: &[&str]) -> StreamRequest {
    let cmd = command.iter().map(|&argument| argument.to_owned()).collect();
    StreamRequest::Start { cmd, env: [].into(), cwd: None, user: None, timeout_sec: None }
}

/// A command that has ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub code: i32,
}

/// Waits for a command.
///
/// # Errors
///
/// Returns the error that the daemon tells.
///
/// # Panics
///
/// Panics if it does not go on.
pub async fn collect(mut output: CommandOutput) -> Result<Ran, ClientError> {
    let mut ran = Ran::default();
    loop {
        match timeout(LIMIT, output.next()).await.expect("the command goes on")? {
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
/// Returns the error that the daemon tells.
pub async fn run(client: &Client, sandbox: &str, command: &[&str]) -> Result<Ran, ClientError> {
    let (mut input, output) = client.start_command(sandbox, &start(command)).await?;
    input.end().await?;
    collect(output).await
}

/// Runs a script that succeeds, and returns what it printed.
///
/// # Panics
///
/// Panics if it fails.
pub async fn shell(client: &Client, sandbox: &str, script: &str) -> String {
    let ran = run(client, sandbox, &["sh", "-c", script]).await.expect("the command runs");
    assert_eq!(ran.code, 0, "{script}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).expect("text")
}

/// What the daemon says went wrong.
#[must_use]
pub fn code_of(error: &ClientError) -> Option<ErrorCode> {
    match error {
        ClientError::Refused(body) => Some(body.code),
        _ => None,
    }
}
