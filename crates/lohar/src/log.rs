//! Lines for the console.

use std::fmt;
use std::io::Write;

/// Writes one line to the console, prefixed with the agent's name. A failed write is ignored:
/// there is no other place to report it.
pub(crate) fn line(message: fmt::Arguments<'_>) {
    drop(writeln!(std::io::stderr(), "lohar: {message}"));
}

/// Returns the text of an operating system error as in the protocol: without its number and
/// beginning in lower case, as the original agent printed it.
pub(crate) fn errno_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_text_matches_the_original_agent() {
        let missing = std::io::Error::from_raw_os_error(libc::ENOENT);

        assert_eq!(errno_text(&missing), "no such file or directory");
    }
}
