//! What an image says about the processes of its sandboxes, and the name of its root file system.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Prefix of the files of root file systems.
const ROOT_PREFIX: &str = "rootfs-";

/// Maximum length of the name of a root file system's file, in bytes.
const ROOT_BYTES_MAX: usize = 160;

/// The settings of an image that processes in its sandboxes get. Empty fields are not set.
///
/// Source: the OCI image specification, `config.md`; `Shell` is Docker's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// Variables of the environment.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The user: a name or number, and `:` and a group if there is one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// The working directory.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub workdir: String,
    /// The command that runs the image, to which `cmd` or a request's arguments are appended.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// The arguments of the entrypoint, or a command.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// The ports on which the image's application listens, such as `8080/tcp`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<String>,
    /// The labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The shell for commands that are one text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shell: Vec<String>,
    /// The signal that asks the command to end.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

impl ImageConfig {
    /// Returns the command that runs the image with these arguments, or with its own if there are
    /// none. It is empty if the image has no command and there are no arguments.
    #[must_use]
    pub fn command(&self, arguments: Vec<String>) -> Vec<String> {
        let arguments = if arguments.is_empty() { self.cmd.clone() } else { arguments };
        self.entrypoint.iter().cloned().chain(arguments).collect()
    }

    /// Returns the number of the stop signal. `None` if there is none, or none with this name or
    /// number; the signals for real-time use, such as `SIGRTMIN+3`, are not supported.
    #[must_use]
    pub fn stop_signal_number(&self) -> Option<u8> {
        let name = self.stop_signal.trim().to_ascii_uppercase();
        let name = name.strip_prefix("SIG").unwrap_or(&name);
        let named = || SIGNALS.iter().position(|signal| *signal == name).map(|index| index + 1);
        let number = name.parse().ok().or_else(named)?;
        u8::try_from(number).ok().filter(|_| (1..=SIGNALS.len()).contains(&number))
    }
}

/// The names of Linux's signals, from number 1 on, without `SIG`: see signal(7).
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// A text that is not the name of a root file system's file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the name of a root file system")]
pub struct ParseRootError(String);

/// The name of a root file system in a host's store of images. It names the content: another
/// content has another name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootName(Box<str>);

impl RootName {
    /// Returns the name as text. It is the name of a file, without a directory.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RootName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RootName {
    type Err = ParseRootError;

    fn from_str(text: &str) -> Result<Self, ParseRootError> {
        let is_safe = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        let is_name = text.starts_with(ROOT_PREFIX)
            && text.len() <= ROOT_BYTES_MAX
            && text.bytes().all(is_safe);
        if is_name {
            Ok(Self(text.into()))
        } else {
            Err(ParseRootError(text.chars().take(200).collect()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_signals_are_names_or_numbers() {
        let number = |text: &str| {
            let config = ImageConfig { stop_signal: text.to_owned(), ..Default::default() };
            config.stop_signal_number()
        };
        for (text, expected) in [
            ("SIGINT", Some(2)),
            ("quit", Some(3)),
            ("15", Some(15)),
            ("SIGSYS", Some(31)),
            ("", None),
            ("0", None),
            ("32", None),
            ("258", None),
            ("SIGRTMIN+3", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
    }

    #[test]
    fn arguments_replace_the_command_and_follow_the_entrypoint() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let config = ImageConfig {
            entrypoint: words("app --quiet"),
            cmd: words("serve"),
            ..Default::default()
        };

        assert_eq!(config.command(Vec::new()), words("app --quiet serve"));
        assert_eq!(config.command(words("check all")), words("app --quiet check all"));
        assert_eq!(ImageConfig::default().command(words("ls")), words("ls"));
        assert!(ImageConfig::default().command(Vec::new()).is_empty());
    }

    #[test]
    fn root_name_is_a_file_name_without_a_directory() {
        for text in ["rootfs-oci1-0123abcd.ext4", "rootfs-minimal-1.2.ext4"] {
            assert_eq!(text.parse::<RootName>().unwrap().as_str(), text);
        }
        let long = format!("rootfs-{}", "a".repeat(200));
        for text in ["", "kernel-1", "rootfs-a/b", "../rootfs-a", "rootfs-a\0", &long] {
            assert!(text.parse::<RootName>().is_err(), "{text:?}");
        }
    }
}
