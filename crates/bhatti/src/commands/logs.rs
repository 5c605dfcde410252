//! `bhatti job logs`.

use std::io::{self, Write};

use clap::Args;

use super::Context;
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bhatti job logs dev s3\n  bhatti job logs --follow dev s3")]
pub(crate) struct Logs {
    /// Name, id, or a prefix of the id of six digits or more
    sandbox: String,
    /// Job id, as printed by `bhatti exec --detach` and `bhatti jobs`
    job: String,
    /// Follow the output until the job ends
    #[arg(short, long)]
    follow: bool,
    /// Byte offset to start at [default: the first byte that is kept]
    #[arg(long, value_name = "BYTE")]
    offset: Option<u64>,
}

pub(crate) async fn run(context: &Context, arguments: &Logs) -> Result<(), CliError> {
    let Logs { sandbox, job, follow, offset } = arguments;
    let output = async |id: &str| context.client.job_output(id, job, *offset, *follow).await;
    let mut output = context.read(sandbox, output).await?;
    let mut stdout = io::stdout();
    while let Some(bytes) = output.next().await? {
        stdout.write_all(&bytes)?;
        stdout.flush()?;
    }
    Ok(())
}
