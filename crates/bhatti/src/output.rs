//! The output of commands.

mod human;
mod paint;
mod table;
mod transfer;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;

use crate::error::CliError;

use human::harmless;
pub(crate) use human::{bytes, mib, one_line, unix_time};
pub(crate) use paint::Paint;
pub(crate) use table::{Cell, Table, facts};
pub(crate) use transfer::Transfer;

/// Prints results in the requested format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
    /// Print only what scripts need.
    pub(crate) quiet: bool,
    /// Whether standard output is a terminal.
    pub(crate) terminal: bool,
    paint: Paint,
    error_paint: Paint,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self {
            json,
            quiet,
            terminal: io::stdout().is_terminal(),
            paint: Paint::of(&io::stdout()),
            error_paint: Paint::of(&io::stderr()),
        }
    }

    /// Returns whether progress is shown: to a user at a terminal, unless JSON or quiet output is
    /// requested.
    pub(crate) fn is_watched(self) -> bool {
        !self.json && !self.quiet && io::stderr().is_terminal()
    }

    /// Prints `value` as JSON, or as the text that `text` makes of it. Prints no text if output is
    /// quiet.
    pub(crate) fn show<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        match (self.json, self.quiet) {
            (true, _) => self.print(&json(value)?),
            (false, true) => Ok(()),
            (false, false) => self.print(&text(value)),
        }
    }

    /// Prints a resource that was created: as JSON, by its id alone if output is quiet, as the
    /// text that `text` makes of it on a terminal, or else by its id and name.
    pub(crate) fn show_made<T: Serialize>(
        self,
        value: &T,
        (id, name): (&str, &str),
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        match (self.json, self.quiet, self.terminal) {
            (true, ..) => self.print(&json(value)?),
            (false, true, _) => self.print(id),
            (false, false, true) => self.print(&text(value)),
            (false, false, false) => self.print(&format!("{id}\t{name}")),
        }
    }

    /// Prints facts about one resource: as JSON, or as a list of names and values.
    pub(crate) fn show_facts<T: Serialize>(
        self,
        value: &T,
        facts_of: impl FnOnce(&T) -> Vec<(&'static str, Cell)>,
    ) -> Result<(), CliError> {
        if self.json {
            return self.print(&json(value)?);
        }
        self.print(&facts(&facts_of(value), self.terminal, self.paint))
    }

    /// Prints resources of one kind: as JSON, by their names alone if output is quiet, or as a
    /// table.
    pub(crate) fn show_list<T: Serialize>(
        self,
        items: &[T],
        table: &Table<T>,
    ) -> Result<(), CliError> {
        match (self.json, self.quiet) {
            (true, _) => self.print(&json(&items)?),
            (false, true) => {
                let keys: Vec<String> = items.iter().map(|item| (table.key)(item) + "\n").collect();
                self.print(&keys.concat())
            }
            (false, false) => self.print(&table.text(items, self.terminal, self.paint)),
        }
    }

    /// Prints that `what` was done to the resource `name`.
    pub(crate) fn done(self, kind: &str, name: &str, what: &str) -> Result<(), CliError> {
        self.show(&serde_json::json!({ kind: name, "status": what }), |_| format!("{what} {name}"))
    }

    pub(crate) fn print(self, text: &str) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        if !text.ends_with('\n') && !text.is_empty() {
            stdout.write_all(b"\n")?;
        }
        Ok(stdout.flush()?)
    }

    /// Prints a note beside the result, if progress is shown.
    pub(crate) fn note(self, text: &str) {
        if self.is_watched() {
            // The reader may be gone; only the result counts.
            drop(writeln!(io::stderr(), "{}", self.error_paint.dim(&harmless(text))));
        }
    }

    /// Prints a note that belongs to the result, unless output is quiet.
    pub(crate) fn tell(self, text: &str) {
        if !self.quiet {
            // The reader may be gone; only the result counts.
            drop(writeln!(io::stderr(), "{}", harmless(text)));
        }
    }

    /// Prints an error, and returns its exit code.
    pub(crate) fn fail(self, error: &CliError) -> ExitCode {
        if !error.is_silent() {
            let mut stderr = io::stderr().lock();
            let paint = self.error_paint;
            let written = if self.json {
                let body = serde_json::json!({ "error": error.message, "code": error.code, "hint": error.hint });
                writeln!(stderr, "{body}")
            } else {
                let line = writeln!(stderr, "{} {}", paint.bad("error:"), harmless(&error.message));
                line.and_then(|()| match &error.hint {
                    Some(hint) => {
                        writeln!(stderr, "{} {}", paint.good("hint:"), harmless(hint))
                    }
                    None => Ok(()),
                })
            };
            // If this fails, there is no place left to report it.
            drop(written);
        }
        ExitCode::from(error.exit)
    }
}

fn json<T: Serialize>(value: &T) -> Result<String, CliError> {
    serde_json::to_string_pretty(value).map_err(|error| CliError::of(&error))
}
