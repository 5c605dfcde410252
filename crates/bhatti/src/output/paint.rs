//! Colors on terminals.

use std::io::IsTerminal;

use anstyle::{AnsiColor, Style};

/// Colors text, or leaves it as it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint {
    pub(super) colored: bool,
}

impl Paint {
    /// Colors output to a terminal, unless the environment disables colors: see no-color.org.
    pub(super) fn of(stream: &impl IsTerminal) -> Self {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { colored: stream.is_terminal() && !is_set("NO_COLOR") && !dumb }
    }

    /// Returns the text in a style.
    pub(super) fn styled(self, text: &str, style: Style) -> String {
        if self.colored { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }

    pub(super) fn good(self, text: &str) -> String {
        self.styled(text, AnsiColor::Green.on_default())
    }

    pub(super) fn bad(self, text: &str) -> String {
        self.styled(text, AnsiColor::Red.on_default().bold())
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.styled(text, Style::new().dimmed())
    }
}

/// Returns the color of a state.
pub(super) fn of_state(text: &str) -> Style {
    let hot = text.contains("(hot)") || text == "running" || text == "done";
    match text {
        _ if hot => AnsiColor::Green.on_default(),
        _ if text.contains("(warm)") => AnsiColor::Yellow.on_default(),
        _ if text.contains("(cold)") || text == "stopped" => AnsiColor::Blue.on_default(),
        _ if text.starts_with("failed") => AnsiColor::Red.on_default(),
        _ => Style::new(),
    }
}
