//! `bhatti list`.

use bhatti_api::Sandbox;
use clap::Args;

use super::Context;
use super::lifecycle::status;
use crate::error::CliError;
use crate::output::{Cell, Table, mib};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bhatti list\n  bhatti list --label team=web --quiet")]
pub(crate) struct List {
    /// Only sandboxes with this label (repeatable; all must match)
    #[arg(short, long, value_name = "KEY=VALUE")]
    label: Vec<String>,
}

const SANDBOXES: Table<Sandbox> = Table {
    header: &["ID", "NAME", "STATUS", "IMAGE", "CPUS", "MEMORY", "ADDRESS", "CREATED"],
    row: |sandbox| {
        vec![
            sandbox.id.clone().into(),
            sandbox.name.clone().into(),
            Cell::State(status(sandbox)),
            sandbox.image.clone().into(),
            Cell::number(sandbox.cpus),
            mib(sandbox.memory_mb).into(),
            sandbox.ip.clone().unwrap_or_else(|| "-".to_owned()).into(),
            Cell::Time(sandbox.created_at.clone()),
        ]
    },
    key: |sandbox| sandbox.name.clone(),
};

pub(crate) async fn run(context: &Context, arguments: &List) -> Result<(), CliError> {
    context.output.show_list(&context.client.list_labelled(&arguments.label).await?, &SANDBOXES)
}
