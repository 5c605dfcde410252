//! What commands print.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;

use crate::error::CliError;

/// Prints in the way that was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
    pub(crate) terminal: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, terminal: io::stdout().is_terminal() }
    }

    /// Prints `value` as JSON, or else what `text` makes of it.
    pub(crate) fn show<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        let shown = if self.json { json(value)? } else { text(value) };
        self.print(&shown)
    }

    pub(crate) fn print(self, text: &str) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        if !text.ends_with('\n') && !text.is_empty() {
            stdout.write_all(b"\n")?;
        }
        Ok(stdout.flush()?)
    }

    /// Tells what went wrong.
    pub(crate) fn fail(self, error: &CliError) -> ExitCode {
        if !error.is_silent() {
            let mut stderr = io::stderr().lock();
            let told = if self.json {
                let body = serde_json::json!({ "error": error.message, "code": error.code, "hint": error.hint });
                writeln!(stderr, "{body}")
            } else {
                writeln!(stderr, "error: {}", error.message).and_then(|()| match &error.hint {
                    Some(hint) => writeln!(stderr, "hint: {hint}"),
                    None => Ok(()),
                })
            };
            // There is no place left to complain in.
            drop(told);
        }
        ExitCode::from(error.exit)
    }
}

fn json<T: Serialize>(value: &T) -> Result<String, CliError> {
    serde_json::to_string_pretty(value).map_err(|error| CliError::of(&error))
}

/// Rows as a table: columns as wide as their widest cell, two spaces apart, nothing behind the last.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header = header.iter().map(|&title| title.to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&header).chain(rows).collect();
    let width =
        |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |row: &&Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    all.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [
            vec!["1".into(), "a-long-name".into(), "x".into()],
            vec!["22".into(), "b".into(), String::new()],
        ];

        let expected = "ID  NAME         STATE\n1   a-long-name  x\n22  b";
        assert_eq!(table(&["ID", "NAME", "STATE"], &rows), expected);
    }
}
