//! `bhatti completion`.

use clap::Args;
use clap_complete::{Shell, generate};

use super::Context;
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti completion bash > /etc/bash_completion.d/bhatti\n  bhatti completion zsh > ~/.zfunc/_bhatti\n  bhatti completion fish > ~/.config/fish/completions/bhatti.fish"
)]
pub(crate) struct Completion {
    /// Shell to print the script for
    #[arg(value_parser = ["bash", "zsh", "fish"])]
    shell: String,
}

pub(crate) fn run(
    context: &Context,
    arguments: &Completion,
    command: &mut clap::Command,
) -> Result<(), CliError> {
    let shell: Shell = arguments.shell.parse().map_err(|error: String| CliError::new(error))?;
    let mut script = Vec::new();
    generate(shell, command, "bhatti", &mut script);
    context.output.print(&String::from_utf8_lossy(&script))
}
