//! `bhatti shell`.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use bhatti_api::StreamRequest;
use bhatti_client::ShellOptions;
use clap::Args;

use super::detach_keys::DetachKeys;
use super::{Context, exec, terminal};
use crate::error::CliError;
use crate::options::parse_variable;

/// Runs the best shell that the image has, as a login shell that reads its commands.
const PIPED_SHELL: &str =
    "for s in zsh bash sh; do s=$(command -v $s) && exec env SHELL=\"$s\" \"$s\" -l; done";

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti shell dev\n  bhatti shell dev --attach s3\n  bhatti shell dev < script.sh\n\nThe detach keys work at any time; the terminal keeps running, and the next `bhatti shell` reattaches to it. If standard input is not a terminal, the shell reads its commands from it."
)]
pub(crate) struct Shell {
    /// Name or id
    sandbox: String,
    /// Terminal to reattach to, as `bhatti jobs` lists it [default: the newest detached one]
    #[arg(long, value_name = "SESSION")]
    attach: Option<String>,
    /// Always open a new terminal
    #[arg(long, conflicts_with = "attach")]
    new: bool,
    /// Environment variable for a new terminal (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable, conflicts_with = "attach")]
    env: Vec<(String, String)>,
    /// Working directory of a new terminal [default: /workspace]
    #[arg(short = 'w', long, value_name = "DIR", conflicts_with = "attach")]
    workdir: Option<String>,
    /// User of a new terminal [default: the image's usual user]
    #[arg(short, long, conflicts_with = "attach")]
    user: Option<String>,
    /// Keys that detach from the terminal, such as ctrl-p,ctrl-q
    #[arg(long, value_name = "KEYS", env = "BHATTI_DETACH_KEYS", default_value = DetachKeys::DEFAULT)]
    detach_keys: DetachKeys,
}

pub(crate) async fn run(context: &Context, arguments: Shell) -> Result<ExitCode, CliError> {
    let Shell { sandbox, attach, new, env, workdir, user, detach_keys } = arguments;
    if attach.is_none() && !io::stdin().is_terminal() {
        let start = StreamRequest::Start {
            entrypoint: false,
            cmd: ["/bin/sh", "-c", PIPED_SHELL].map(str::to_owned).to_vec(),
            env: env.into_iter().collect(),
            cwd: workdir,
            user,
            timeout_sec: None,
        };
        return exec::stream(context, &sandbox, &start, exec::Stdin { passed_on: true }).await;
    }
    // These options apply only to a new terminal.
    let new = new || !env.is_empty() || workdir.is_some() || user.is_some();
    let options = ShellOptions { session: attach, new, env, workdir, user, ..Default::default() };
    terminal::run(context, &sandbox, options, &detach_keys).await.map_err(CliError::of_exec)
}
