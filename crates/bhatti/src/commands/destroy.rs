//! `bhatti destroy`.

use bhatti_api::{ErrorCode, Sandbox};
use bhatti_client::{Client, ClientError};
use clap::Args;

use super::Context;
use super::several::{confirm, each};
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bhatti destroy dev\n  bhatti destroy --yes dev try-1 try-2")]
pub(crate) struct Destroy {
    /// Names or ids of the sandboxes
    #[arg(required = true)]
    sandboxes: Vec<String>,
    /// Do not ask for confirmation
    #[arg(short, long)]
    yes: bool,
}

pub(crate) async fn run(context: &Context, arguments: &Destroy) -> Result<(), CliError> {
    each(context, &arguments.sandboxes, async |typed| {
        let find = async |id: &str| find(&context.client, id).await;
        let Found { id, name } = context.change(typed, find).await?;
        confirm(arguments.yes, &format!("destroy {name}, with its disk and its memory"))?;
        // By id: by now, the name may belong to another sandbox.
        let deleted = context.client.destroy(&id).await?;
        context.output.done("sandbox", &name, &deleted.status)
    })
    .await
}

/// The sandbox to destroy.
struct Found {
    id: String,
    name: String,
}

/// Looks up a sandbox. A sandbox whose row is damaged can be destroyed, but not read.
async fn find(client: &Client, id_or_name: &str) -> Result<Found, ClientError> {
    match client.inspect(id_or_name).await {
        Ok(Sandbox { id, name, .. }) => Ok(Found { id, name }),
        Err(ClientError::Refused(body)) if body.code == ErrorCode::DamagedRow => {
            Ok(Found { id: id_or_name.to_owned(), name: id_or_name.to_owned() })
        }
        Err(error) => Err(error),
    }
}
