//! `bhatti run`.

use std::process::ExitCode;

use bhatti_api::{CreateSandbox, StreamRequest};
use bhatti_types::Report;
use clap::Args;

use super::image_pull::{self, PullPolicy};
use super::{Context, exec};
use crate::error::CliError;
use crate::options::parse_variable;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti run -- python3 -c 'print(6*7)'\n  bhatti run python:3.12-slim -- python -c 'print(6*7)'\n  bhatti run dev --memory 1024 -- make test\n  tar c . | bhatti run dev -- sh -c 'tar x && make'\n\nCreates a sandbox, runs the command in it and destroys the sandbox. As with Docker, the command becomes the\narguments of the image's entrypoint, and without a command, the image's own runs. Exits with the command's exit code; 125 if bhatti failed."
)]
pub(crate) struct Run {
    /// Image to start from, a name or a reference such as python:3.12-slim [default: minimal]
    image: Option<String>,
    /// When to pull the image from its registry
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    pull: PullPolicy,
    /// Run this program in place of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Number of virtual CPUs [default: 1]
    #[arg(long, value_name = "COUNT")]
    cpus: Option<u64>,
    /// Memory in MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Environment variable to set (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Working directory [default: /workspace]
    #[arg(short = 'w', long, value_name = "DIR")]
    workdir: Option<String>,
    /// User to run as, a name or a number [default: the image's usual user]
    #[arg(short, long)]
    user: Option<String>,
    /// Network mode, nat or none [default: nat if this host supports it]
    #[arg(long, value_name = "MODE")]
    network: Option<String>,
    /// End the command after this many seconds [default: never]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Do not pass on standard input
    #[arg(short = 'n', long)]
    no_stdin: bool,
    /// Command and its arguments [default: those of the image]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(crate) async fn run(context: &Context, arguments: Run) -> Result<ExitCode, CliError> {
    let pull = image_pull::ahead(context, arguments.image.as_deref(), arguments.pull).await;
    let pull = pull.map_err(CliError::of_exec)?;
    let request = CreateSandbox {
        image: arguments.image,
        pull,
        cpus: arguments.cpus,
        memory_mb: arguments.memory,
        network: arguments.network,
        ..CreateSandbox::default()
    };
    let command = arguments.entrypoint.iter().chain(&arguments.command).cloned().collect();
    let created = context.client.create(&request).await;
    let sandbox = created.map_err(|error| CliError::of_exec(error.into()))?;
    let start = StreamRequest::Start {
        cmd: command,
        entrypoint: arguments.entrypoint.is_none(),
        env: arguments.env.into_iter().collect(),
        cwd: arguments.workdir,
        user: arguments.user,
        timeout_sec: arguments.timeout,
    };
    let stdin = exec::Stdin { passed_on: !arguments.no_stdin };
    let ran = exec::stream(context, &sandbox.id, &start, stdin).await;
    if let Err(error) = context.client.destroy(&sandbox.id).await {
        let note = format!("failed to destroy the sandbox {}: {}", sandbox.id, Report(&error));
        context.output.note(&note);
    }
    ran
}
