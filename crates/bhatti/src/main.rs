//! `bhatti`: the daemon and its command line.

mod cli;
mod commands;
mod config;
mod dispatch;
mod error;
mod options;
mod output;
mod paths;
mod saved;

use std::process::ExitCode;

use clap::Parser;

use cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = output::Output::new(cli.global.json, cli.global.quiet);
    match dispatch::run_cli(cli, &output) {
        Ok(code) => code,
        Err(error) => output.fail(&error),
    }
}
