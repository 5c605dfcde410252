//! `bhatti volume`.

use bhatti_api::{CloneVolume, CreateVolume, ResizeVolume, Volume};
use serde_json::json;

use super::Context;
use crate::cli;
use crate::error::CliError;
use crate::output::table;

pub(super) async fn run(context: &Context, command: cli::Volume) -> Result<(), CliError> {
    let (client, output) = (&context.client, context.output);
    let short = |volume: &Volume| format!("{}\t{}", volume.id, volume.name);
    match command {
        cli::Volume::Create { name, size } => {
            output.show(&client.create_volume(&CreateVolume { name, size_mb: size }).await?, short)
        }
        cli::Volume::List => output.show(&client.list_volumes().await?, |volumes| {
            let rows: Vec<_> = volumes.iter().map(row).collect();
            table(&["NAME", "SIZE", "ON DISK", "ATTACHED TO", "CREATED"], &rows)
        }),
        cli::Volume::Inspect { name } => {
            output.show(&client.inspect_volume(&name).await?, describe)
        }
        cli::Volume::Resize { name, size } => {
            let request = ResizeVolume { size_mb: size };
            output.show(&client.resize_volume(&name, &request).await?, describe)
        }
        cli::Volume::Clone { name, copy } => {
            output.show(&client.clone_volume(&name, &CloneVolume { name: copy }).await?, short)
        }
        cli::Volume::Delete { names } => {
            for name in names {
                let deleted = client.delete_volume(&name).await?;
                output.show(&json!({ "volume": name, "status": deleted.status }), |_| {
                    format!("{} {name}", deleted.status)
                })?;
            }
            Ok(())
        }
    }
}

fn attached_to(volume: &Volume) -> String {
    let users = volume.attached_to.iter().map(|user| {
        let how = if user.readonly { " (ro)" } else { "" };
        format!("{}{how}", user.sandbox)
    });
    let users: Vec<String> = users.collect();
    if users.is_empty() { "-".to_owned() } else { users.join(", ") }
}

fn row(volume: &Volume) -> Vec<String> {
    vec![
        volume.name.clone(),
        format!("{} MiB", volume.size_mb),
        format!("{} MiB", volume.disk_bytes.div_ceil(1 << 20)),
        attached_to(volume),
        volume.created_at.chars().take("2026-01-02T03:04:05".len()).collect(),
    ]
}

fn describe(volume: &Volume) -> String {
    [
        format!("id:        {}", volume.id),
        format!("name:      {}", volume.name),
        format!("size:      {} MiB", volume.size_mb),
        format!("on disk:   {} bytes", volume.disk_bytes),
        format!("attached:  {}", attached_to(volume)),
        format!("created:   {}", volume.created_at),
    ]
    .join("\n")
}
