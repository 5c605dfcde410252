//! Reading a value that must not be seen: from standard input, or from a prompt without echo.

use std::io::{self, IsTerminal, Read, Write};

use super::terminal::Settings;
use crate::error::CliError;

/// Reads a value. One line break at its end is not part of it.
///
/// # Errors
///
/// Returns an error if standard input cannot be read, or is not UTF-8.
pub(super) fn read(prompt: &str) -> Result<String, CliError> {
    let mut value = String::new();
    if io::stdin().is_terminal() {
        let mut stderr = io::stderr();
        write!(stderr, "{prompt} (hidden): ")?;
        stderr.flush()?;
        {
            let _hidden = Settings::hidden()?;
            io::stdin().read_line(&mut value)?;
        }
        writeln!(stderr)?;
    } else {
        io::stdin().read_to_string(&mut value).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => CliError::new("the value is not valid UTF-8"),
            _ => error.into(),
        })?;
    }
    Ok(value.strip_suffix('\n').unwrap_or(&value).to_owned())
}
