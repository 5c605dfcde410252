//! Whether there is a Firecracker that can be used.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use tokio::time::timeout;

/// The oldest Firecracker that can be used. The one before forgets vsock when it restores.
pub const MINIMUM: Version = Version(1, 16, 1);

/// How long it may take to say its version.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A version: `1.16.1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u16, u16, u16);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl FromStr for Version {
    type Err = ();

    /// Of what comes behind a third number nothing matters.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut numbers = text.split('.').map(|part| {
            part.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok())
        });
        let mut next = || numbers.next().flatten().ok_or(());
        Ok(Self(next()?, next()?, next()?))
    }
}

/// Firecracker cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It is not there.
    #[error("`{}` is not installed", program.display())]
    NotInstalled {
        /// The program.
        program: PathBuf,
    },
    /// It is there, and does not say what it is.
    #[error("`{}` does not say its version", program.display())]
    Silent {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is older than what can be used.
    #[error("`{}` is version {found}, and {MINIMUM} is the oldest that can be used: vsock is dead after a restore in earlier ones", program.display())]
    TooOld {
        /// The program.
        program: PathBuf,
        /// Its version.
        found: Version,
    },
}

/// Looks for `program`, a path or a name to look up, and checks its version. Returns where it is, and which.
///
/// # Errors
///
/// Returns why it cannot be used.
pub async fn check(program: &Path) -> Result<(PathBuf, Version), Unusable> {
    let found =
        look_up(program).ok_or_else(|| Unusable::NotInstalled { program: program.to_owned() })?;
    let silent = |source| Unusable::Silent { program: found.clone(), source };
    let asked = bhatti_host::process::command(&found).arg("--version").output();
    let output = timeout(ANSWER_LIMIT, asked)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(silent)?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split_whitespace().find_map(|word| word.strip_prefix('v')?.parse().ok());
    let version = version.ok_or_else(|| silent(io::ErrorKind::InvalidData.into()))?;
    if version < MINIMUM {
        return Err(Unusable::TooOld { program: found, found: version });
    }
    Ok((found, version))
}

fn look_up(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|place| place.join(program)).find(|place| place.is_file())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    async fn saying(line: &str) -> Result<Version, Unusable> {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("firecracker");
        std::fs::write(&program, format!("#!/bin/sh\necho '{line}'\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        check(&program).await.map(|(_, version)| version)
    }

    #[tokio::test]
    async fn version_below_the_minimum_is_refused_with_the_reason() {
        assert_eq!(saying("Firecracker v1.16.1").await.unwrap(), MINIMUM);
        assert_eq!(saying("Firecracker v1.17.0-dev").await.unwrap(), Version(1, 17, 0));
        assert_eq!(saying("Firecracker v2.0.0").await.unwrap(), Version(2, 0, 0));
        for old in ["Firecracker v1.16.0", "Firecracker v0.25.2"] {
            let error = saying(old).await.unwrap_err();
            assert!(matches!(error, Unusable::TooOld { .. }), "{error}");
            assert!(error.to_string().contains("vsock"), "{error}");
        }
        assert!(matches!(saying("what?").await, Err(Unusable::Silent { .. })));
        let none = check(Path::new("/nowhere/firecracker")).await.unwrap_err();
        assert!(matches!(none, Unusable::NotInstalled { .. }));
    }
}
