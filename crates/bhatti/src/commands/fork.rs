//! `bhatti fork`.

use bhatti_api::ForkSandbox;

use super::Context;
use crate::cli::Fork;
use crate::error::CliError;

pub(super) async fn run(context: &Context, arguments: Fork) -> Result<(), CliError> {
    let Fork { sandbox, count, name, env, inherit_env } = arguments;
    let request = ForkSandbox {
        count,
        name,
        env: env.into_iter().collect(),
        inherit_env,
        ..ForkSandbox::default()
    };
    let forks = context.client.fork(&sandbox, &request).await?;
    context.output.show(&forks, |forks| {
        let lines = forks.sandboxes.iter().map(|fork| format!("{}\t{}\n", fork.id, fork.name));
        lines.collect()
    })
}
