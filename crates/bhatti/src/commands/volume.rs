//! `bhatti volume`.

use bhatti_api::{CloneVolume, CreateVolume, ResizeVolume, Volume as Listed};
use clap::Subcommand;

use super::Context;
use super::several::{confirm, each};
use crate::error::CliError;
use crate::output::{Cell, Table, bytes, mib};

#[derive(Debug, Subcommand)]
pub(crate) enum Volume {
    /// Create an empty volume
    #[command(after_help = "Example:\n  bhatti volume create data --size 4096")]
    Create {
        /// Name of the volume
        name: String,
        /// Size in MiB [default: 1024]
        #[arg(long, value_name = "MIB")]
        size: Option<u64>,
    },
    /// List volumes
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti volume list")]
    List,
    /// Show one volume
    #[command(after_help = "Example:\n  bhatti volume inspect data")]
    Inspect {
        /// Name of the volume
        name: String,
    },
    /// Grow a volume (it must not be attached)
    #[command(after_help = "Example:\n  bhatti volume resize data --size 8192")]
    Resize {
        /// Name of the volume
        name: String,
        /// New size in MiB
        #[arg(long, value_name = "MIB")]
        size: u64,
    },
    /// Copy a volume (no sandbox may write it)
    #[command(after_help = "Example:\n  bhatti volume clone data data-2")]
    Clone {
        /// Name of the volume
        name: String,
        /// Name of the copy
        copy: String,
    },
    /// Delete volumes and their content (they must not be attached)
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti volume delete data-2")]
    Delete {
        /// Names of the volumes
        #[arg(required = true)]
        names: Vec<String>,
        /// Do not ask for confirmation
        #[arg(short, long)]
        yes: bool,
    },
}

const VOLUMES: Table<Listed> = Table {
    header: &["NAME", "SIZE", "ON DISK", "ATTACHED TO", "CREATED"],
    row: |volume| {
        vec![
            volume.name.clone().into(),
            mib(volume.size_mb).into(),
            bytes(volume.disk_bytes).into(),
            attached_to(volume).into(),
            Cell::Time(volume.created_at.clone()),
        ]
    },
    key: |volume| volume.name.clone(),
};

pub(crate) async fn run(context: &Context, command: Volume) -> Result<(), CliError> {
    let (client, output) = (&context.client, context.output);
    let show_made = |volume: &Listed| {
        output.show_made(volume, (&volume.id, &volume.name), |volume| {
            format!("created volume {} of {}", volume.name, mib(volume.size_mb))
        })
    };
    match command {
        Volume::Create { name, size } => {
            show_made(&client.create_volume(&CreateVolume { name, size_mb: size }).await?)
        }
        Volume::List => output.show_list(&client.list_volumes().await?, &VOLUMES),
        Volume::Inspect { name } => {
            output.show_facts(&client.inspect_volume(&name).await?, describe)
        }
        Volume::Resize { name, size } => {
            let request = ResizeVolume { size_mb: size };
            output.show_facts(&client.resize_volume(&name, &request).await?, describe)
        }
        Volume::Clone { name, copy } => {
            show_made(&client.clone_volume(&name, &CloneVolume { name: copy }).await?)
        }
        Volume::Delete { names, yes } => {
            each(context, &names, async |name| {
                confirm(yes, &format!("delete the volume {name} and its content"))?;
                let deleted = client.delete_volume(name).await?;
                output.done("volume", name, &deleted.status)
            })
            .await
        }
    }
}

fn attached_to(volume: &Listed) -> String {
    let users = volume.attached_to.iter().map(|user| {
        let how = if user.readonly { " (ro)" } else { "" };
        format!("{}{how}", user.sandbox)
    });
    let users: Vec<String> = users.collect();
    if users.is_empty() { "-".to_owned() } else { users.join(", ") }
}

fn describe(volume: &Listed) -> Vec<(&'static str, Cell)> {
    vec![
        ("id", Cell::from(&volume.id)),
        ("name", Cell::from(&volume.name)),
        ("size", mib(volume.size_mb).into()),
        ("on disk", bytes(volume.disk_bytes).into()),
        ("attached", attached_to(volume).into()),
        ("created", Cell::Time(volume.created_at.clone())),
    ]
}
