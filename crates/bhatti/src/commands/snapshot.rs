//! `bhatti snapshot`.

use bhatti_api::{CreateSnapshot, ResumeSnapshot, Snapshot};
use serde_json::json;

use super::Context;
use crate::cli;
use crate::error::CliError;
use crate::output::table;

pub(super) async fn run(context: &Context, command: cli::Snapshot) -> Result<(), CliError> {
    let (client, output) = (&context.client, context.output);
    match command {
        cli::Snapshot::Create { sandbox, name } => {
            let snapshot = client.create_snapshot(&sandbox, &CreateSnapshot { name }).await?;
            output.show(&snapshot, |snapshot| format!("{}\t{}", snapshot.id, snapshot.name))
        }
        cli::Snapshot::List => {
            let snapshots = client.list_snapshots().await?;
            output.show(&snapshots, |snapshots| {
                let rows: Vec<_> = snapshots.iter().map(row).collect();
                table(&["NAME", "SANDBOX", "CPUS", "MEMORY", "KIND", "SAVED", "CREATED"], &rows)
            })
        }
        cli::Snapshot::Inspect { name } => {
            output.show(&client.inspect_snapshot(&name).await?, describe)
        }
        cli::Snapshot::Resume { snapshot, name, env, keep_hot } => {
            let request = ResumeSnapshot {
                name,
                env: env.into_iter().collect(),
                keep_hot,
                ..ResumeSnapshot::default()
            };
            let sandbox = client.resume_snapshot(&snapshot, &request).await?;
            output.show(&sandbox, |sandbox| format!("{}\t{}", sandbox.id, sandbox.name))
        }
        cli::Snapshot::Delete { names } => {
            for name in names {
                let deleted = client.delete_snapshot(&name).await?;
                output.show(&json!({ "snapshot": name, "status": deleted.status }), |_| {
                    format!("{} {name}", deleted.status)
                })?;
            }
            Ok(())
        }
    }
}

fn row(snapshot: &Snapshot) -> Vec<String> {
    vec![
        snapshot.name.clone(),
        snapshot.sandbox.clone(),
        snapshot.cpus.to_string(),
        format!("{} MiB", snapshot.memory_mb),
        snapshot.kind.clone(),
        format!("{} MiB", snapshot.memory_bytes.div_ceil(1 << 20)),
        snapshot.created_at.chars().take("2026-01-02T03:04:05".len()).collect(),
    ]
}

fn describe(snapshot: &Snapshot) -> String {
    [
        format!("id:       {}", snapshot.id),
        format!("name:     {}", snapshot.name),
        format!("sandbox:  {} ({})", snapshot.sandbox, snapshot.sandbox_id),
        format!("cpus:     {}", snapshot.cpus),
        format!("memory:   {} MiB", snapshot.memory_mb),
        format!("saved:    {} bytes ({})", snapshot.memory_bytes, snapshot.kind),
        format!("created:  {}", snapshot.created_at),
    ]
    .join("\n")
}
