//! What commands print.

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

/// Prints in the way that was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
    /// No more than what a script needs.
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

    /// Whether there is a person who watches how something goes on.
    pub(crate) fn is_watched(self) -> bool {
        !self.json && !self.quiet && io::stderr().is_terminal()
    }

    /// Prints `value` as JSON, or else what `text` makes of it; nothing if only the necessary is wanted.
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

    /// Prints something that was made: as JSON, by its id alone, or as `text` tells it to a person.
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

    /// Prints facts about one thing: as JSON, or as a list of what each of them is called and is.
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

    /// Prints things of one kind: as JSON, by their names alone, or as a table.
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

    /// Prints what was done to something that was named.
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

    /// Tells somebody who watches something beside the result.
    pub(crate) fn note(self, text: &str) {
        if self.is_watched() {
            // Whoever watched may have gone; the result is what counts.
            drop(writeln!(io::stderr(), "{}", self.error_paint.dim(&harmless(text))));
        }
    }

    /// Tells something that belongs to the result and is none, unless only the necessary is wanted.
    pub(crate) fn tell(self, text: &str) {
        if !self.quiet {
            // Whoever listened may have gone; the result is what counts.
            drop(writeln!(io::stderr(), "{}", harmless(text)));
        }
    }

    /// Tells what went wrong.
    pub(crate) fn fail(self, error: &CliError) -> ExitCode {
        if !error.is_silent() {
            let mut stderr = io::stderr().lock();
            let paint = self.error_paint;
            let told = if self.json {
                let body = serde_json::json!({ "error": error.message, "code": error.code, "hint": error.hint });
                writeln!(stderr, "{body}")
            } else {
                let said = writeln!(stderr, "{} {}", paint.bad("error:"), harmless(&error.message));
                said.and_then(|()| match &error.hint {
                    Some(hint) => {
                        writeln!(stderr, "{} {}", paint.good("hint:"), harmless(hint))
                    }
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
