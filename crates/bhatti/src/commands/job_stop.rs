//! `bhatti job stop`.

use clap::Args;

use super::{Context, several, wait};
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti job stop dev s3 --time 30\n\n\
                        The command of an image (`bhatti create --start`) gets the image's stop \
                        signal; other jobs get\nSIGTERM.")]
pub(crate) struct Stop {
    /// Name, id, or a prefix of the id of six digits or more
    sandbox: String,
    /// Ids of jobs, as `bhatti jobs` lists them
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<String>,
    /// Seconds before a job that goes on is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
        value_parser = clap::value_parser!(u32).range(..=3600))]
    time: u32,
}

pub(crate) async fn run(context: &Context, arguments: &Stop) -> Result<(), CliError> {
    let Stop { sandbox, jobs, time } = arguments;
    several::each(context, jobs, async |job| {
        let stop = async |id: &str| context.client.stop_job(id, job, Some(*time)).await;
        context.change(sandbox, stop).await?;
        let ended = wait::until_ended(context, sandbox, job).await?;
        context.output.show(&ended, |job| format!("{} stopped", job.id))
    })
    .await
}
