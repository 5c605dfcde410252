//! Operations on several resources, one after the other.

use std::io::{self, IsTerminal, Write};

use bhatti_api::Deleted;
use bhatti_client::ClientError;

use super::Context;
use crate::error::CliError;

/// Applies `act` to each of several resources. A failure is printed at once and does not stop the
/// others. The error that is returned says how many failed.
pub(super) async fn each(
    context: &Context,
    things: &[String],
    act: impl AsyncFn(&str) -> Result<(), CliError>,
) -> Result<(), CliError> {
    if let [one] = things {
        return act(one).await;
    }
    let mut failed = 0;
    for thing in things {
        match act(thing).await {
            // The daemon, or the reader of the output, is gone.
            Err(error) if error.is_lost() || error.is_silent() => return Err(error),
            Err(error) => {
                context.output.fail(&error);
                failed += 1;
            }
            Ok(()) => {}
        }
    }
    match failed {
        0 => Ok(()),
        failed => Err(CliError::new(format!("{failed} of {} failed", things.len()))),
    }
}

/// Deletes several resources of a kind.
pub(super) async fn delete(
    context: &Context,
    kind: &str,
    names: &[String],
    act: impl AsyncFn(&str) -> Result<Deleted, ClientError>,
) -> Result<(), CliError> {
    each(context, names, async |name| {
        let deleted = act(name).await?;
        context.output.done(kind, name, &deleted.status)
    })
    .await
}

/// Asks the user to confirm `what`, if standard input is a terminal. `--yes` answers beforehand.
pub(super) fn confirm(yes: bool, what: &str) -> Result<(), CliError> {
    if yes || !io::stdin().is_terminal() {
        return Ok(());
    }
    let mut stderr = io::stderr();
    write!(stderr, "{what}? [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(CliError::new(format!("did not {what}"))),
    }
}
