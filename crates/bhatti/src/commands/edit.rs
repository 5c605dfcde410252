//! `bhatti edit`.

use bhatti_api::UpdateSandbox;
use clap::Args;

use super::Context;
use super::lifecycle::status;
use crate::error::CliError;
use crate::options::parse_variable;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti edit dev --name main --keep-hot\n  bhatti edit dev --label team=web --label-delete stage\n  bhatti edit dev --timeout 3600 --on-timeout stop"
)]
pub(crate) struct Edit {
    /// Name or id
    sandbox: String,
    #[command(flatten)]
    change: Change,
}

/// The changes.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct Change {
    /// New name
    #[arg(long)]
    name: Option<String>,
    /// Label to set (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    label: Vec<(String, String)>,
    /// Label to remove (repeatable)
    #[arg(long, value_name = "KEY")]
    label_delete: Vec<String>,
    /// Keep the sandbox hot while it is unused
    #[arg(long)]
    keep_hot: bool,
    /// Let the sandbox sleep while it is unused
    #[arg(long, conflicts_with = "keep_hot")]
    allow_cold: bool,
    /// End the sandbox this many seconds from now; 0 removes the limit
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// What happens when the time is over
    #[arg(long, value_name = "ACTION", value_parser = ["destroy", "stop"])]
    on_timeout: Option<String>,
}

pub(crate) async fn run(context: &Context, Edit { sandbox, change }: Edit) -> Result<(), CliError> {
    let Change { name, label, label_delete, keep_hot, allow_cold, timeout, on_timeout } = change;
    let gained = label.into_iter().map(|(key, value)| (key, Some(value)));
    let lost = label_delete.into_iter().map(|key| (key, None));
    let request = UpdateSandbox {
        name,
        labels: gained.chain(lost).collect(),
        keep_hot: (keep_hot || allow_cold).then_some(keep_hot),
        timeout_sec: timeout,
        on_timeout,
    };
    let sandbox =
        context.change(&sandbox, async |id| context.client.update(id, &request).await).await?;
    context.output.show(&sandbox, |sandbox| format!("{} {}", sandbox.name, status(sandbox)))
}
