//! `bhatti job kill`.

use clap::Args;

use super::Context;
use super::several;
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti job kill dev s3")]
pub(crate) struct Kill {
    /// Name or id
    sandbox: String,
    /// Ids of terminals or jobs, as `bhatti jobs` lists them
    #[arg(required = true, value_name = "SESSION")]
    sessions: Vec<String>,
}

pub(crate) async fn run(context: &Context, arguments: &Kill) -> Result<(), CliError> {
    several::each(context, &arguments.sessions, async |session| {
        let kill = async |id: &str| context.client.kill_session(id, session).await;
        let killed = context.change(&arguments.sandbox, kill).await?;
        context.output.done("session", session, &killed.status)
    })
    .await
}
