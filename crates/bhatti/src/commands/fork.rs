//! `bhatti fork`.

use bhatti_api::{ForkSandbox, Sandbox};
use clap::Args;

use super::Context;
use crate::error::CliError;
use crate::options::parse_variable;
use crate::output::Table;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti fork dev --name try --count 3")]
pub(crate) struct Fork {
    /// Name or id of the parent
    sandbox: String,
    /// Number of forks [default: 1]
    #[arg(long, value_name = "COUNT")]
    count: Option<u32>,
    /// Name of the fork; several forks are named NAME-1, NAME-2, … [default: random]
    #[arg(long)]
    name: Option<String>,
    /// Environment variable for new processes (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Inherit the parent's environment in new processes
    #[arg(long)]
    inherit_env: bool,
    /// Secret to expose as an environment variable of new processes (repeatable)
    #[arg(long, value_name = "NAME")]
    secret: Vec<String>,
    /// Label to set (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    label: Vec<(String, String)>,
}

const FORKS: Table<Sandbox> = Table {
    header: &["ID", "NAME"],
    row: |fork| vec![fork.id.clone().into(), fork.name.clone().into()],
    key: |fork| fork.id.clone(),
};

pub(crate) async fn run(context: &Context, arguments: Fork) -> Result<(), CliError> {
    let Fork { sandbox, count, name, env, inherit_env, secret, label } = arguments;
    let request = ForkSandbox {
        count,
        name,
        env: env.into_iter().collect(),
        inherit_env,
        secrets: secret,
        labels: label.into_iter().collect(),
    };
    let forks =
        context.change(&sandbox, async |id| context.client.fork(id, &request).await).await?;
    if context.output.json {
        return context.output.show(&forks, |_| String::new());
    }
    context.output.show_list(&forks.sandboxes, &FORKS)?;
    let milliseconds = forks.parent_paused_us.div_ceil(1000);
    context.output.note(&format!("the parent was paused for {milliseconds} ms"));
    Ok(())
}
