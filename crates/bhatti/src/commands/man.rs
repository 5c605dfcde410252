//! `bhatti man`: manual pages for `make install`.

use std::path::PathBuf;

use clap::Args;

use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti man /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// Directory for the pages, one for each command
    directory: PathBuf,
}

pub(crate) fn run(arguments: &Man, command: clap::Command) -> Result<(), CliError> {
    std::fs::create_dir_all(&arguments.directory)?;
    Ok(clap_mangen::generate_to(command, &arguments.directory)?)
}
