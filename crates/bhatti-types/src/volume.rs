//! Volumes: their number, and the paths where they are mounted.

use std::fmt;
use std::str::FromStr;

/// Maximum of volumes of one sandbox: each takes a slot on the machine's bus.
pub const VOLUMES_MAX: usize = 8;

/// Maximum length of a mount path, in bytes.
const MOUNT_BYTES_MAX: usize = 1024;

/// Directories that the guest needs to work. No volume is mounted over or below them.
const CLOSED: [&str; 13] = [
    "bin",
    "boot",
    "dev",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "proc",
    "run",
    "sbin",
    "sys",
    "lost+found",
];

/// Directories that hold other directories. A volume may be mounted below, but not over them.
const SHARED: [&str; 7] = ["home", "opt", "root", "srv", "tmp", "usr", "var"];

/// Directories in `/usr` that belong to the guest's system.
const CLOSED_IN_USR: [&str; 7] = ["bin", "lib", "lib32", "lib64", "libx32", "libexec", "sbin"];

/// A path where no volume can be mounted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid mount path `{text}`: {why}")]
pub struct InvalidMount {
    text: String,
    why: &'static str,
}

/// The mount path of a volume in the guest: an absolute path without `.` and `..` that is not a
/// directory of the system.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountPath(Box<str>);

impl MountPath {
    /// Returns the path as text, without a trailing slash.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MountPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for MountPath {
    type Err = InvalidMount;

    fn from_str(text: &str) -> Result<Self, InvalidMount> {
        let refused = |why| {
            let text = text.chars().take(64).collect();
            Err(InvalidMount { text, why })
        };
        if !text.starts_with('/') {
            return refused("it must begin with `/`");
        }
        if text.len() > MOUNT_BYTES_MAX {
            return refused("it is too long");
        }
        if text.chars().any(char::is_control) {
            return refused("it must not contain control characters");
        }
        let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty()).collect();
        if parts.iter().any(|part| matches!(*part, "." | "..")) {
            return refused("it must not contain `.` or `..`");
        }
        let is_system = match parts[..] {
            [] => true,
            [first] => CLOSED.contains(&first) || SHARED.contains(&first),
            ["usr", second, ..] => CLOSED_IN_USR.contains(&second),
            // Often links to closed directories.
            ["var", "run" | "lock", ..] => true,
            // Databases of the guest agent and of the package manager.
            ["var", "lib"] | ["var", "lib", "lohar" | "dpkg", ..] => true,
            [first, ..] => CLOSED.contains(&first),
        };
        if is_system {
            return refused("volumes cannot be mounted over system directories");
        }
        Ok(Self(format!("/{}", parts.join("/")).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_path_cannot_be_a_system_directory() {
        for (text, path) in [
            ("/data", "/data"),
            ("/data/", "/data"),
            ("//data//x", "/data/x"),
            ("/workspace", "/workspace"),
            ("/var/lib/postgresql", "/var/lib/postgresql"),
            ("/usr/local/share/x", "/usr/local/share/x"),
            ("/home/user/.cache", "/home/user/.cache"),
            ("/mnt", "/mnt"),
            ("/with space", "/with space"),
        ] {
            assert_eq!(text.parse::<MountPath>().map(|it| it.to_string()), Ok(path.to_owned()));
        }
        let long = format!("/{}", "x".repeat(1024));
        for text in [
            "",
            "data",
            "/",
            "//",
            "/etc",
            "/etc/",
            "/etc/x",
            "/proc/1",
            "/usr",
            "/usr/bin",
            "/usr/lib/x",
            "/var",
            "/var/run",
            "/var/lib",
            "/var/lib/lohar/x",
            "/tmp",
            "/data/../etc",
            "/./etc",
            "/a\nb",
            "/a\0b",
            &long,
        ] {
            assert!(text.parse::<MountPath>().is_err(), "{text:?}");
        }
    }
}
