//! Lines for the console.

use std::fmt;
use std::io::Write;

/// Writes one line, with the agent's name in front. A console that cannot be written to is nobody's to complain to.
pub(crate) fn line(message: fmt::Arguments<'_>) {
    drop(writeln!(std::io::stderr(), "lohar: {message}"));
}

/// An operating system error as the protocol words it: the bare text in lower case, as the original agent printed it.
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
    fn errors_are_worded_as_the_original_agent_did() {
        let missing = std::io::Error::from_raw_os_error(libc::ENOENT);

        assert_eq!(errno_text(&missing), "no such file or directory");
    }
}
