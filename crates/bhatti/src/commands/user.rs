//! `bhatti user`.

use bhatti_api::{CreateUser, CreatedUser, Limits, UpdateUser, User as Listed};
use clap::{Args, Subcommand};

use super::{Context, several};
use crate::error::CliError;
use crate::output::{Cell, Table};

#[derive(Debug, Subcommand)]
pub(crate) enum User {
    /// Create a user and print its API key, which is shown only once
    #[command(after_help = "Example:\n  bhatti user create alice --max-sandboxes 10")]
    Create {
        /// Name of the user
        name: String,
        #[command(flatten)]
        limits: LimitArguments,
    },
    /// List users
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti user list")]
    List,
    /// Show one user
    #[command(after_help = "Example:\n  bhatti user inspect alice")]
    Inspect {
        /// Name of the user
        name: String,
    },
    /// Change the limits of a user
    #[command(after_help = "Example:\n  bhatti user edit alice --max-volume-mb 40960")]
    Edit {
        /// Name of the user
        name: String,
        #[command(flatten)]
        limits: LimitArguments,
    },
    /// Replace the API key of a user and print the new one, which is shown only once
    #[command(after_help = "Example:\n  bhatti user rotate-key alice")]
    RotateKey {
        /// Name of the user
        name: String,
    },
    /// Delete users that own nothing
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti user delete alice")]
    Delete {
        /// Names of the users
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// Limits of a user.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct LimitArguments {
    /// Maximum number of sandboxes
    #[arg(long, value_name = "COUNT")]
    max_sandboxes: Option<u32>,
    /// Maximum virtual CPUs per sandbox
    #[arg(long, value_name = "COUNT")]
    max_cpus: Option<u32>,
    /// Maximum memory per sandbox, in MiB
    #[arg(long, value_name = "MIB")]
    max_memory: Option<u32>,
    /// Maximum number of named snapshots
    #[arg(long, value_name = "COUNT")]
    max_snapshots: Option<u32>,
    /// Maximum size of all volumes together, in MiB
    #[arg(long, value_name = "MIB")]
    max_volume_mb: Option<u32>,
    /// Maximum host disk space of sandboxes and snapshots together, in MiB
    #[arg(long, value_name = "MIB")]
    max_disk_mb: Option<u32>,
}

const USERS: Table<Listed> = Table {
    header: &[
        "ID",
        "NAME",
        "SANDBOXES",
        "CPUS EACH",
        "MIB EACH",
        "SNAPSHOTS",
        "VOLUME MIB",
        "DISK MIB",
        "CREATED",
    ],
    row: |user| {
        let Limits {
            max_sandboxes,
            max_cpus_per_sandbox,
            max_memory_mb_per_sandbox,
            max_snapshots,
            max_volume_mb,
            max_disk_mb,
        } = user.limits;
        vec![
            user.id.clone().into(),
            user.name.clone().into(),
            limit(max_sandboxes),
            limit(max_cpus_per_sandbox),
            limit(max_memory_mb_per_sandbox),
            limit(max_snapshots),
            limit(max_volume_mb),
            limit(max_disk_mb),
            Cell::Time(user.created_at.clone()),
        ]
    },
    key: |user| user.name.clone(),
};

fn limit(limit: Option<u32>) -> Cell {
    limit.map_or_else(|| "any".into(), |limit| Cell::number(limit.into()))
}

pub(crate) async fn run(context: &Context, command: User) -> Result<(), CliError> {
    let (client, output) = (&context.client, context.output);
    match command {
        User::Create { name, limits } => {
            let LimitArguments {
                max_sandboxes,
                max_cpus,
                max_memory,
                max_snapshots,
                max_volume_mb,
                max_disk_mb,
            } = limits;
            let request = CreateUser {
                name,
                max_sandboxes,
                max_cpus_per_sandbox: max_cpus,
                max_memory_mb_per_sandbox: max_memory,
                max_snapshots,
                max_volume_mb,
                max_disk_mb,
            };
            show_key(context, &client.create_user(&request).await?, "created")
        }
        User::List => output.show_list(&client.list_users().await?, &USERS),
        User::Inspect { name } => output.show_facts(&client.inspect_user(&name).await?, describe),
        User::Edit { name, limits } => {
            let LimitArguments {
                max_sandboxes,
                max_cpus,
                max_memory,
                max_snapshots,
                max_volume_mb,
                max_disk_mb,
            } = limits;
            let request = UpdateUser {
                max_sandboxes,
                max_cpus_per_sandbox: max_cpus,
                max_memory_mb_per_sandbox: max_memory,
                max_snapshots,
                max_volume_mb,
                max_disk_mb,
            };
            output.show_facts(&client.update_user(&name, &request).await?, describe)
        }
        User::RotateKey { name } => {
            show_key(context, &client.rotate_key(&name).await?, "has a new key")
        }
        User::Delete { names } => {
            several::delete(context, "user", &names, async |name| client.delete_user(name).await)
                .await
        }
    }
}

/// Prints a user's new API key, which is shown only once; with `--quiet`, the key alone.
fn show_key(context: &Context, user: &CreatedUser, what: &str) -> Result<(), CliError> {
    if context.output.quiet && !context.output.json {
        return context.output.print(&user.api_key);
    }
    context.output.show(user, |user| {
        let CreatedUser { name, api_key, .. } = user;
        format!(
            "user {name} {what}\nAPI key: {api_key}\nIt is shown only once. Use it with: bhatti login https://HOST:PORT"
        )
    })
}

fn describe(user: &Listed) -> Vec<(&'static str, Cell)> {
    vec![
        ("id", Cell::from(&user.id)),
        ("name", Cell::from(&user.name)),
        ("sandboxes", limit(user.limits.max_sandboxes)),
        ("cpus each", limit(user.limits.max_cpus_per_sandbox)),
        ("MiB each", limit(user.limits.max_memory_mb_per_sandbox)),
        ("snapshots", limit(user.limits.max_snapshots)),
        ("volume MiB", limit(user.limits.max_volume_mb)),
        ("disk MiB", limit(user.limits.max_disk_mb)),
        ("created", Cell::Time(user.created_at.clone())),
    ]
}
