//! `bhatti job wait`.

use std::process::ExitCode;

use bhatti_api::Job;
use clap::Args;

use super::Context;
use super::exec::exit_code;
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bhatti job wait dev s3\n\nExits with the job's code; 125 if bhatti failed."
)]
pub(crate) struct Wait {
    /// Name, id, or a prefix of the id of six digits or more
    sandbox: String,
    /// Job id, as printed by `bhatti exec --detach` and `bhatti jobs`
    job: String,
}

pub(crate) async fn run(context: &Context, arguments: &Wait) -> Result<ExitCode, CliError> {
    wait(context, arguments).await.map_err(CliError::of_exec)
}

async fn wait(context: &Context, Wait { sandbox, job }: &Wait) -> Result<ExitCode, CliError> {
    let ended = until_ended(context, sandbox, job).await?;
    let code = ended.exit_code.unwrap_or_default();
    context.output.show(&ended, |job| format!("{} exited {code}", job.id))?;
    Ok(exit_code(code))
}

/// Waits until a job has ended.
pub(super) async fn until_ended(
    context: &Context,
    sandbox: &str,
    job: &str,
) -> Result<Job, CliError> {
    let inspect = async |id: &str| context.client.inspect_job(id, job).await;
    loop {
        let now = context.read(sandbox, inspect).await?;
        if !now.running && now.exit_code.is_some() {
            return Ok(now);
        }
        // The output stream ends with the job, so no polling is needed.
        let rest =
            async |id: &str| context.client.job_output(id, job, Some(now.output_end), true).await;
        let mut rest = context.read(sandbox, rest).await?;
        while rest.next().await?.is_some() {}
    }
}
