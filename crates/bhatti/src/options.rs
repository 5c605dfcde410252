//! Options of every command, and parsers of option values.

use std::path::PathBuf;

use clap::Args;

/// Heading of the global options in the help.
const EVERYWHERE: &str = "Global options";

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Data directory of the daemon [default: /var/lib/bhatti for root, else
    /// ~/.local/share/bhatti]
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "BHATTI_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Saved daemon to call: see `bhatti context` [default: the current one]
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "BHATTI_CONTEXT", value_name = "NAME", conflicts_with = "url")]
    pub(crate) context: Option<String>,
    /// URL of a remote daemon, https://HOST:PORT [default: that of the current context, else the
    /// local daemon]
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "BHATTI_URL", value_name = "URL")]
    pub(crate) url: Option<String>,
    /// API key for --url
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "BHATTI_TOKEN", value_name = "KEY", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Print JSON
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub(crate) json: bool,
    /// Print only what scripts need, such as ids and names
    #[arg(short, long, global = true, help_heading = EVERYWHERE)]
    pub(crate) quiet: bool,
}

/// Parses `NAME=VALUE`. The value is all text after the first equals sign.
pub(crate) fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_of_a_variable_is_all_text_after_the_first_equals_sign() {
        assert_eq!(parse_variable("A=b=c,d"), Ok(("A".into(), "b=c,d".into())));
        assert!(parse_variable("A").is_err());
    }
}
