//! `bhatti ps`.

use clap::Args;

use super::{Context, jobs, list};
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti ps")]
pub(crate) struct Ps {
    #[command(flatten)]
    list: list::List,
    /// Sandbox whose jobs are listed: see `bhatti jobs`
    #[arg(hide = true)]
    sandbox: Option<String>,
}

pub(crate) async fn run(context: &Context, arguments: &Ps) -> Result<(), CliError> {
    match &arguments.sandbox {
        Some(sandbox) => jobs::list(context, sandbox).await,
        None => list::run(context, &arguments.list).await,
    }
}
