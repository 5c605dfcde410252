//! `bhatti destroy`.

use clap::Args;

use super::Context;
use super::several::{confirm, each};
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bhatti destroy dev\n  bhatti destroy --yes dev try-1 try-2")]
pub(crate) struct Destroy {
    /// Names or ids
    #[arg(required = true)]
    sandboxes: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub(super) async fn run(context: &Context, arguments: &Destroy) -> Result<(), CliError> {
    each(context, &arguments.sandboxes, async |typed| {
        let sandbox = context.change(typed, async |id| context.client.inspect(id).await).await?;
        let name = &sandbox.name;
        confirm(arguments.yes, &format!("destroy {name}, with its disk and its memory"))?;
        // By id: what was asked about, whatever is called so by now.
        let deleted = context.client.destroy(&sandbox.id).await?;
        context.output.done("sandbox", name, &deleted.status)
    })
    .await
}
