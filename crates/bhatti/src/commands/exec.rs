//! `bhatti exec`.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use bhatti_api::{ExecRequest, ExecResult, Output, StreamRequest};
use bhatti_client::{CommandEvent, CommandInput, CommandOutput, MESSAGE_BYTES_MAX, ShellOptions};
use clap::Args;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use tokio::time::Instant;

use super::detach_keys::DetachKeys;
use super::{Context, terminal};
use crate::error::CliError;
use crate::options::parse_variable;

/// Number of signals within [`INSISTING`] that end this process, whatever the command does.
const INSISTING_SIGNALS: usize = 3;
const INSISTING: Duration = Duration::from_secs(2);

/// Signals that are passed on to the command.
const FORWARDED: [SignalKind; 4] =
    [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()];

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti exec dev python3 -c 'print(6*7)'\n  bhatti exec -it dev vi notes\n  bhatti exec -d dev make test\n  tar c . | bhatti exec dev tar x -C /workspace\n\nOptions come before the command. Exits with the command's exit code; 124 if the command timed out, 125 if bhatti failed, 126 if the command cannot be executed, 127 if it is not found."
)]
pub(crate) struct Exec {
    /// Name or id
    sandbox: String,
    /// Environment variable to set (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Working directory [default: /workspace]
    #[arg(short = 'w', long, value_name = "DIR")]
    workdir: Option<String>,
    /// User to run as, a name or a number [default: the image's usual user]
    #[arg(short, long)]
    user: Option<String>,
    /// End the command after this many seconds [default: never]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Pass on standard input; always done, accepted for the habit of `-it`
    #[arg(short, long, conflicts_with = "detach")]
    interactive: bool,
    /// Do not pass on standard input, so that a loop over lines keeps its lines
    #[arg(short = 'n', long, conflicts_with_all = ["detach", "interactive", "tty"])]
    no_stdin: bool,
    /// Allocate a terminal; the detach keys leave the command running
    #[arg(short, long, conflicts_with = "detach")]
    tty: bool,
    /// Keys that detach from the terminal, such as ctrl-p,ctrl-q
    #[arg(long, value_name = "KEYS", env = "BHATTI_DETACH_KEYS", default_value = DetachKeys::DEFAULT)]
    detach_keys: DetachKeys,
    /// Run the command as a job and print the job's id; see `bhatti job`
    #[arg(short, long)]
    detach: bool,
    /// Restart the job each time the sandbox boots (after a reboot, or a start without its
    /// memory), until the job has ended
    #[arg(long, requires = "detach")]
    restart: bool,
    /// Command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(crate) async fn run(context: &Context, arguments: Exec) -> Result<ExitCode, CliError> {
    let Exec {
        sandbox,
        env,
        workdir,
        user,
        timeout,
        interactive: _,
        no_stdin,
        tty,
        detach_keys,
        detach,
        restart,
        command,
    } = arguments;
    if detach {
        let request = ExecRequest {
            entrypoint: false,
            cmd: command,
            env: env.into_iter().collect(),
            cwd: workdir,
            user,
            timeout_sec: timeout,
            detach: true,
            restart,
            stdin: None,
            stdin_base64: None,
        };
        return start_job(context, &sandbox, &request).await.map_err(CliError::of_exec);
    }
    if tty {
        let options = ShellOptions {
            new: true,
            command,
            env,
            user,
            workdir,
            timeout_sec: timeout,
            ..ShellOptions::default()
        };
        return terminal::run(context, &sandbox, options, &detach_keys)
            .await
            .map_err(CliError::of_exec);
    }
    let start = StreamRequest::Start {
        entrypoint: false,
        cmd: command,
        env: env.into_iter().collect(),
        cwd: workdir,
        user,
        timeout_sec: timeout,
    };
    stream(context, &sandbox, &start, Stdin { passed_on: !no_stdin }).await
}

async fn start_job(
    context: &Context,
    sandbox: &str,
    request: &ExecRequest,
) -> Result<ExitCode, CliError> {
    let start = async |id: &str| context.client.start_job(id, request).await;
    let job = context.change(sandbox, start).await?;
    if context.output.json {
        context.output.show(&job, |_| String::new())?;
    } else {
        context.output.print(&job.id)?;
        context.output.note(&format!(
            "follow the output with: bhatti job logs --follow {sandbox} {}",
            job.id
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a command that uses the standard streams of this process.
pub(crate) async fn stream(
    context: &Context,
    sandbox: &str,
    start: &StreamRequest,
    stdin: Stdin,
) -> Result<ExitCode, CliError> {
    run_command(context, sandbox, start, stdin).await.map_err(CliError::of_exec)
}

/// The use of this process's standard input.
pub(crate) struct Stdin {
    /// Whether standard input is passed on to the command.
    pub(super) passed_on: bool,
}

async fn run_command(
    context: &Context,
    sandbox: &str,
    start: &StreamRequest,
    stdin: Stdin,
) -> Result<ExitCode, CliError> {
    let start = async |id: &str| context.client.start_command(id, start).await;
    let (input, output) = context.change(sandbox, start).await?;
    let code = tokio::select! {
        code = async {
            if context.output.json { print_json(context, output).await } else { print(output).await }
        } => code?,
        error = feed(input, stdin) => return Err(error),
    };
    Ok(exit_code(code))
}

/// Converts a command's exit code to the exit code of this process: a kernel allows 0 to 255.
pub(crate) fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
}

async fn print(mut output: CommandOutput) -> Result<i32, CliError> {
    loop {
        match output.next().await? {
            CommandEvent::Stdout(bytes) => write(&mut io::stdout().lock(), &bytes)?,
            CommandEvent::Stderr(bytes) => write(&mut io::stderr().lock(), &bytes)?,
            CommandEvent::Exit(code) => return Ok(code),
        }
    }
}

/// Prints the result in one piece, as the API does.
async fn print_json(context: &Context, mut output: CommandOutput) -> Result<i32, CliError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let exit_code = loop {
        match output.next().await? {
            CommandEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            CommandEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            CommandEvent::Exit(code) => break code,
        }
    };
    let (stdout, stderr) = (Output::new(stdout), Output::new(stderr));
    let result = ExecResult {
        exit_code,
        stdout: stdout.text,
        stderr: stderr.text,
        stdout_base64: stdout.base64,
        stderr_base64: stderr.base64,
    };
    context.output.show(&result, |_| String::new())?;
    Ok(exit_code)
}

fn write(stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()
}

/// Passes on standard input and signals. Ends only with an error of this process: if the
/// connection breaks, the output reports that.
async fn feed(mut input: CommandInput, Stdin { passed_on }: Stdin) -> CliError {
    let mut signals = match FORWARDED.map(signal).into_iter().collect::<io::Result<Vec<Signal>>>() {
        Ok(signals) => signals,
        Err(error) => return error.into(),
    };
    let mut stdin = tokio::io::stdin();
    let (mut buffer, mut unsent, mut stdin_open) = (vec![0; MESSAGE_BYTES_MAX], 0, passed_on);
    let mut recent = VecDeque::new();
    if !passed_on && input.end().await.is_err() {
        return std::future::pending().await;
    }
    loop {
        let sent = tokio::select! {
            number = next_signal(&mut signals, &FORWARDED) => {
                if is_insisting(&mut recent) {
                    return CliError::interrupted(number);
                }
                input.signal(number).await
            }
            // A command that does not read blocks its input, but not its signals.
            () = input.ready(), if unsent > 0 => input.write(&buffer[..std::mem::take(&mut unsent)]).await,
            read = stdin.read(&mut buffer), if stdin_open && unsent == 0 => match read {
                Ok(length @ 1..) => {
                    unsent = length;
                    Ok(())
                }
                Ok(_) => {
                    stdin_open = false;
                    input.end().await
                }
                Err(error) => return error.into(),
            },
        };
        if sent.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Records a signal. Returns whether so many have arrived that this process must end.
fn is_insisting(recent: &mut VecDeque<Instant>) -> bool {
    let now = Instant::now();
    recent.retain(|earlier| now - *earlier < INSISTING);
    recent.push_back(now);
    recent.len() >= INSISTING_SIGNALS
}

/// Waits for one of these signals, and returns its number.
pub(crate) async fn next_signal(signals: &mut [Signal], kinds: &[SignalKind]) -> u8 {
    std::future::poll_fn(|cx| {
        let arrived = signals.iter_mut().position(|signal| signal.poll_recv(cx).is_ready());
        arrived.map_or(std::task::Poll::Pending, |index| {
            std::task::Poll::Ready(u8::try_from(kinds[index].as_raw_value()).unwrap_or_default())
        })
    })
    .await
}
