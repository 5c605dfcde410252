//! `bhatti jobs` and `bhatti job`.

use std::process::ExitCode;

use bhatti_api::Session;
use clap::{Args, Subcommand};

use super::{Context, job_stop, kill, logs, wait};
use crate::error::CliError;
use crate::output::{Cell, Table};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti jobs dev")]
pub(crate) struct Jobs {
    /// Name, id, or a prefix of the id of six digits or more
    sandbox: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Job {
    /// List the jobs and terminals of a sandbox
    #[command(visible_alias = "ls")]
    List(Jobs),
    /// Print the output of a job
    Logs(logs::Logs),
    /// Wait until a job ends, and exit with its exit code
    Wait(wait::Wait),
    /// Ask jobs to end, and wait until they have ended
    Stop(job_stop::Stop),
    /// Kill jobs or terminals
    Kill(kill::Kill),
}

const SESSIONS: Table<Session> = Table {
    header: &["ID", "KIND", "STATUS", "ATTACHED", "CREATED", "COMMAND"],
    row: |session| {
        vec![
            session.session_id.clone().into(),
            if session.tty { "terminal" } else { "job" }.into(),
            Cell::State(status(session)),
            if session.attached { "yes" } else { "no" }.into(),
            Cell::Time(session.created_at.clone()),
            session.argv.clone().into(),
        ]
    },
    key: |session| session.session_id.clone(),
};

fn status(session: &Session) -> String {
    match session.exit_code {
        _ if session.running => "running".to_owned(),
        Some(code) => format!("exited {code}"),
        None => "exited".to_owned(),
    }
}

pub(crate) async fn run(context: &Context, arguments: &Jobs) -> Result<(), CliError> {
    list(context, &arguments.sandbox).await
}

pub(crate) async fn job(context: &Context, command: Job) -> Result<ExitCode, CliError> {
    match command {
        Job::List(arguments) => run(context, &arguments).await?,
        Job::Logs(arguments) => logs::run(context, &arguments).await?,
        Job::Wait(arguments) => return wait::run(context, &arguments).await,
        Job::Stop(arguments) => job_stop::run(context, &arguments).await?,
        Job::Kill(arguments) => kill::run(context, &arguments).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists the jobs and terminals of a sandbox.
pub(super) async fn list(context: &Context, sandbox: &str) -> Result<(), CliError> {
    let list = async |id: &str| context.client.list_sessions(id).await;
    context.output.show_list(&context.read(sandbox, list).await?, &SESSIONS)
}
