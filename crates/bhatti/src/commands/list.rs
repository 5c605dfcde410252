//! `bhatti list`.

use bhatti_api::Sandbox;

use super::Context;
use super::lifecycle::status;
use crate::error::CliError;
use crate::output::table;

pub(super) async fn run(context: &Context) -> Result<(), CliError> {
    let sandboxes = context.client.list().await?;
    context.output.show(&sandboxes, |sandboxes| {
        let rows: Vec<_> = sandboxes.iter().map(row).collect();
        table(&["ID", "NAME", "STATUS", "CPUS", "MEMORY", "CREATED"], &rows)
    })
}

fn row(sandbox: &Sandbox) -> Vec<String> {
    vec![
        sandbox.id.clone(),
        sandbox.name.clone(),
        status(sandbox),
        sandbox.cpus.to_string(),
        format!("{} MiB", sandbox.memory_mb),
        sandbox.created_at.chars().take("2026-01-02T03:04:05".len()).collect(),
    ]
}
