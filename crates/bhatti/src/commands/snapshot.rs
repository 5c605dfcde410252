//! `bhatti snapshot`.

use bhatti_api::{CreateSnapshot, ResumeSnapshot, Snapshot as Listed};
use clap::Subcommand;

use super::{Context, several};
use crate::error::CliError;
use crate::options::parse_variable;
use crate::output::{Cell, Table, bytes, mib};

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Save a running sandbox, which keeps running
    #[command(after_help = "Example:\n  bhatti snapshot create dev ready")]
    Create {
        /// Name or id of the sandbox
        sandbox: String,
        /// Name of the snapshot
        name: String,
    },
    /// List snapshots
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti snapshot list")]
    List,
    /// Show one snapshot
    #[command(after_help = "Example:\n  bhatti snapshot inspect ready")]
    Inspect {
        /// Name of the snapshot
        name: String,
    },
    /// Create a sandbox from a snapshot
    #[command(after_help = "Example:\n  bhatti snapshot resume ready --name again")]
    Resume {
        /// Name of the snapshot
        snapshot: String,
        /// Name of the sandbox [default: random]
        #[arg(long)]
        name: Option<String>,
        /// Environment variable for new processes (repeatable)
        #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
        env: Vec<(String, String)>,
        /// Secret to expose as an environment variable of new processes (repeatable)
        #[arg(long, value_name = "NAME")]
        secret: Vec<String>,
        /// Label to set (repeatable)
        #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
        label: Vec<(String, String)>,
        /// Keep the sandbox hot while it is unused
        #[arg(long)]
        keep_hot: bool,
    },
    /// Delete snapshots (sandboxes created from them stay)
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti snapshot delete ready")]
    Delete {
        /// Names of the snapshots
        #[arg(required = true)]
        names: Vec<String>,
    },
}

const SNAPSHOTS: Table<Listed> = Table {
    header: &["NAME", "SANDBOX", "CPUS", "MEMORY", "KIND", "SAVED", "CREATED"],
    row: |snapshot| {
        vec![
            snapshot.name.clone().into(),
            snapshot.sandbox.clone().into(),
            Cell::number(snapshot.cpus),
            mib(snapshot.memory_mb).into(),
            snapshot.kind.clone().into(),
            bytes(snapshot.memory_bytes).into(),
            Cell::Time(snapshot.created_at.clone()),
        ]
    },
    key: |snapshot| snapshot.name.clone(),
};

pub(crate) async fn run(context: &Context, command: Snapshot) -> Result<(), CliError> {
    let (client, output) = (&context.client, context.output);
    match command {
        Snapshot::Create { sandbox, name } => {
            let request = CreateSnapshot { name };
            let save = async |id: &str| client.create_snapshot(id, &request).await;
            let snapshot = context.change(&sandbox, save).await?;
            output.show_made(&snapshot, (&snapshot.id, &snapshot.name), |snapshot| {
                format!("saved {} as {}", snapshot.sandbox, snapshot.name)
            })
        }
        Snapshot::List => output.show_list(&client.list_snapshots().await?, &SNAPSHOTS),
        Snapshot::Inspect { name } => {
            output.show_facts(&client.inspect_snapshot(&name).await?, describe)
        }
        Snapshot::Resume { snapshot, name, env, secret, label, keep_hot } => {
            let request = ResumeSnapshot {
                name,
                env: env.into_iter().collect(),
                keep_hot,
                secrets: secret,
                labels: label.into_iter().collect(),
            };
            let sandbox = client.resume_snapshot(&snapshot, &request).await?;
            output.show_made(&sandbox, (&sandbox.id, &sandbox.name), |sandbox| {
                format!("created {} ({}) from {snapshot}", sandbox.name, sandbox.id)
            })
        }
        Snapshot::Delete { names } => {
            several::delete(context, "snapshot", &names, async |name| {
                client.delete_snapshot(name).await
            })
            .await
        }
    }
}

fn describe(snapshot: &Listed) -> Vec<(&'static str, Cell)> {
    let mut facts = vec![
        ("id", Cell::from(&snapshot.id)),
        ("name", Cell::from(&snapshot.name)),
        ("sandbox", format!("{} ({})", snapshot.sandbox, snapshot.sandbox_id).into()),
        ("cpus", Cell::number(snapshot.cpus)),
        ("memory", mib(snapshot.memory_mb).into()),
        ("saved", format!("{} ({})", bytes(snapshot.memory_bytes), snapshot.kind).into()),
        ("created", Cell::Time(snapshot.created_at.clone())),
    ];
    facts.extend(snapshot.volumes.iter().map(|volume| ("volume", volume.into())));
    facts
}
