//! `bhatti exec`.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use bhatti_api::{ExecResult, Output, StreamRequest};
use bhatti_client::{CommandEvent, CommandInput, CommandOutput, MESSAGE_BYTES_MAX};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use tokio::time::Instant;

use super::Context;
use crate::cli::Exec;
use crate::error::CliError;

/// So many signals within such a time end us, whatever the command does.
const INSISTING_SIGNALS: usize = 3;
const INSISTING: Duration = Duration::from_secs(2);

/// Signals that are the command's rather than ours.
const FORWARDED: [SignalKind; 4] =
    [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()];

pub(super) async fn run(context: &Context, arguments: Exec) -> Result<ExitCode, CliError> {
    run_command(context, arguments).await.map_err(CliError::of_exec)
}

async fn run_command(context: &Context, arguments: Exec) -> Result<ExitCode, CliError> {
    let Exec { sandbox, env, workdir, command } = arguments;
    let start = StreamRequest::Start {
        cmd: command,
        env: env.into_iter().collect(),
        cwd: workdir,
        user: None,
        timeout_sec: None,
    };
    let (input, output) = context.client.start_command(&sandbox, &start).await?;
    let code = tokio::select! {
        code = async {
            if context.output.json { print_json(context, output).await } else { print(output).await }
        } => code?,
        error = feed(input) => return Err(error),
    };
    // Codes are what the command's own kernel allows: 0 to 255.
    Ok(ExitCode::from(u8::try_from(code & 0xff).unwrap_or(u8::MAX)))
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

/// Passes standard input and signals on. Ends only with an error of our own: if the connection breaks, the output tells.
async fn feed(mut input: CommandInput) -> CliError {
    let mut signals = match FORWARDED.map(signal).into_iter().collect::<io::Result<Vec<Signal>>>() {
        Ok(signals) => signals,
        Err(error) => return error.into(),
    };
    let mut stdin = tokio::io::stdin();
    let (mut buffer, mut unsent, mut stdin_open) = (vec![0; MESSAGE_BYTES_MAX], 0, true);
    let mut recent = VecDeque::new();
    loop {
        let sent = tokio::select! {
            number = next_signal(&mut signals) => {
                if is_insisting(&mut recent) {
                    return CliError::interrupted(number);
                }
                input.signal(number).await
            }
            // A command that does not read holds up its input, and not its signals.
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

/// Whether somebody signals again and again: then it is us who are to end.
fn is_insisting(recent: &mut VecDeque<Instant>) -> bool {
    let now = Instant::now();
    recent.retain(|earlier| now - *earlier < INSISTING);
    recent.push_back(now);
    recent.len() >= INSISTING_SIGNALS
}

async fn next_signal(signals: &mut [Signal]) -> u8 {
    std::future::poll_fn(|cx| {
        let arrived = signals.iter_mut().position(|signal| signal.poll_recv(cx).is_ready());
        arrived.map_or(std::task::Poll::Pending, |index| {
            let number = FORWARDED[index].as_raw_value();
            std::task::Poll::Ready(u8::try_from(number).unwrap_or_default())
        })
    })
    .await
}
