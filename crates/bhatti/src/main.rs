//! `bhatti`: the daemon and its command line.

mod cli;
mod commands;
mod config;
mod dispatch;
mod error;
mod image_task;
mod options;
mod output;
mod paths;
mod saved;

use std::process::ExitCode;

use clap::Parser;

use cli::Cli;

fn main() -> ExitCode {
    // The daemon runs this, not a user. It happens before anything starts a thread.
    if let Some(code) = image_task::run_if_asked() {
        return code;
    }
    let cli = Cli::parse();
    let output = output::Output::new(cli.global.json, cli.global.quiet);
    match dispatch::run_cli(cli, &output) {
        Ok(code) => code,
        Err(error) => output.fail(&error),
    }
}
