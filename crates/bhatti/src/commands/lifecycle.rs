//! `bhatti pause`, `resume`, `stop` and `start`.

use bhatti_api::{Sandbox, StartSandbox};
use bhatti_client::ClientError;
use clap::Args;

use super::{Context, several};
use crate::error::CliError;

/// Names or ids.
#[derive(Debug, Args)]
struct Targets {
    /// Names or ids of the sandboxes
    #[arg(required = true)]
    sandboxes: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti pause dev")]
pub(crate) struct Pause {
    #[command(flatten)]
    targets: Targets,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti resume dev")]
pub(crate) struct Resume {
    #[command(flatten)]
    targets: Targets,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti stop dev")]
pub(crate) struct Stop {
    #[command(flatten)]
    targets: Targets,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bhatti start dev\n  bhatti start dev --cold-boot")]
pub(crate) struct Start {
    #[command(flatten)]
    targets: Targets,
    /// Boot from the disk; the saved memory is lost
    #[arg(long)]
    cold_boot: bool,
}

pub(crate) async fn pause(context: &Context, arguments: &Pause) -> Result<(), CliError> {
    each(context, &arguments.targets, async |id| context.client.pause(id).await).await
}

pub(crate) async fn resume(context: &Context, arguments: &Resume) -> Result<(), CliError> {
    each(context, &arguments.targets, async |id| context.client.resume(id).await).await
}

pub(crate) async fn stop(context: &Context, arguments: &Stop) -> Result<(), CliError> {
    each(context, &arguments.targets, async |id| context.client.stop(id).await).await
}

pub(crate) async fn start(context: &Context, arguments: &Start) -> Result<(), CliError> {
    let request = StartSandbox { cold_boot: arguments.cold_boot };
    each(context, &arguments.targets, async |id| context.client.start(id, &request).await).await
}

async fn each(
    context: &Context,
    targets: &Targets,
    act: impl AsyncFn(&str) -> Result<Sandbox, ClientError>,
) -> Result<(), CliError> {
    several::each(context, &targets.sandboxes, async |typed| {
        let sandbox = context.change(typed, &act).await?;
        context.output.show(&sandbox, |sandbox| format!("{} {}", sandbox.name, status(sandbox)))
    })
    .await
}

/// Returns a sandbox's state and activity, such as `running (hot)`.
pub(crate) fn status(sandbox: &Sandbox) -> String {
    match &sandbox.thermal {
        Some(thermal) => format!("{} ({thermal})", sandbox.status),
        None => sandbox.status.clone(),
    }
}
