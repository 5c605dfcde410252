//! `bhatti inspect`.

use bhatti_api::Sandbox;

use super::Context;
use crate::cli::Target;
use crate::error::CliError;

pub(super) async fn run(context: &Context, target: &Target) -> Result<(), CliError> {
    let sandbox = context.client.inspect(&target.sandbox).await?;
    context.output.show(&sandbox, describe)
}

fn describe(sandbox: &Sandbox) -> String {
    let mut lines = vec![
        format!("id:       {}", sandbox.id),
        format!("name:     {}", sandbox.name),
        format!("status:   {}", sandbox.status),
    ];
    lines.extend(sandbox.reason.iter().map(|reason| format!("reason:   {reason}")));
    lines.push(format!("cpus:     {}", sandbox.cpus));
    lines.push(format!("memory:   {} MiB", sandbox.memory_mb));
    lines.push(format!("created:  {}", sandbox.created_at));
    lines.extend(sandbox.env.iter().map(|(name, value)| format!("env:      {name}={value}")));
    lines.join("\n")
}
