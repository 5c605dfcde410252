//! `bhatti pause`, `resume`, `stop` and `start`.

use bhatti_api::{Sandbox, StartSandbox};

use super::Context;
use crate::cli::{Start, Targets};
use crate::error::CliError;

pub(super) async fn pause(context: &Context, targets: &Targets) -> Result<(), CliError> {
    for sandbox in &targets.sandboxes {
        show(context, &context.client.pause(sandbox).await?)?;
    }
    Ok(())
}

pub(super) async fn resume(context: &Context, targets: &Targets) -> Result<(), CliError> {
    for sandbox in &targets.sandboxes {
        show(context, &context.client.resume(sandbox).await?)?;
    }
    Ok(())
}

pub(super) async fn stop(context: &Context, targets: &Targets) -> Result<(), CliError> {
    for sandbox in &targets.sandboxes {
        show(context, &context.client.stop(sandbox).await?)?;
    }
    Ok(())
}

pub(super) async fn start(context: &Context, arguments: &Start) -> Result<(), CliError> {
    let request = StartSandbox { cold_boot: arguments.cold_boot };
    for sandbox in &arguments.sandboxes {
        show(context, &context.client.start(sandbox, &request).await?)?;
    }
    Ok(())
}

fn show(context: &Context, sandbox: &Sandbox) -> Result<(), CliError> {
    context.output.show(sandbox, |sandbox| format!("{} {}", sandbox.name, status(sandbox)))
}

/// Where a sandbox stands, in a word or two.
pub(super) fn status(sandbox: &Sandbox) -> String {
    match &sandbox.thermal {
        Some(thermal) => format!("{} ({thermal})", sandbox.status),
        None => sandbox.status.clone(),
    }
}
