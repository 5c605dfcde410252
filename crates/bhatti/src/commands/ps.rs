//! `bhatti ps`.

use bhatti_api::Session;
use clap::Args;

use super::Context;
use crate::error::CliError;
use crate::output::{Cell, Table, unix_time};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti ps dev")]
pub(crate) struct Ps {
    /// Name, id, or a prefix of the id of six digits or more
    sandbox: String,
}

const SESSIONS: Table<Session> = Table {
    header: &["ID", "KIND", "STATUS", "ATTACHED", "CREATED", "COMMAND"],
    row: |session| {
        vec![
            session.session_id.clone().into(),
            if session.tty { "terminal" } else { "job" }.into(),
            Cell::State(status(session)),
            if session.attached { "yes" } else { "no" }.into(),
            Cell::Time(unix_time(session.created_at)),
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

pub(crate) async fn run(context: &Context, arguments: &Ps) -> Result<(), CliError> {
    let list = async |id: &str| context.client.list_sessions(id).await;
    context.output.show_list(&context.read(&arguments.sandbox, list).await?, &SESSIONS)
}
