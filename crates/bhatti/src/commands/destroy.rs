//! `bhatti destroy`.

use std::io::{self, IsTerminal, Write};

use clap::Args;

use super::Context;
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bhatti destroy dev\n  bhatti destroy --yes dev try-1 try-2")]
pub(crate) struct Destroy {
    /// Names, ids or beginnings of ids
    #[arg(required = true)]
    sandboxes: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub(super) async fn run(context: &Context, arguments: &Destroy) -> Result<(), CliError> {
    for typed in &arguments.sandboxes {
        let sandbox = context.on(typed, async |id| context.client.inspect(id).await).await?;
        if !arguments.yes && io::stdin().is_terminal() && !confirmed(&sandbox.name)? {
            return Err(CliError::new(format!("{} was not destroyed", sandbox.name)));
        }
        // By id: what was asked about, whatever is called so by now.
        let deleted = context.client.destroy(&sandbox.id).await?;
        context.output.done("sandbox", &sandbox.name, &deleted.status)?;
    }
    Ok(())
}

/// Asks whoever sits at the terminal.
fn confirmed(name: &str) -> io::Result<bool> {
    let mut stderr = io::stderr();
    write!(stderr, "destroy {name}, with its disk and its memory? [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
