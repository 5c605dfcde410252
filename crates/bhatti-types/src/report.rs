//! Prints an error with its causes, in the same form for the log, the API and the command line.

use std::error::Error;
use std::fmt;

/// Displays an error and the chain of its sources, separated by `: `.
pub struct Report<'a>(pub &'a dyn Error);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn report_prints_the_whole_chain() {
        let error = Outer(std::io::Error::other("inner"));

        assert_eq!(Report(&error).to_string(), "outer: inner");
    }
}
