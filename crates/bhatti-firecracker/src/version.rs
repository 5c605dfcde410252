//! Finds a usable Firecracker.

use bhatti_host::blocking;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::process::geteuid;
use tokio::time::timeout;

use crate::JAILER;

/// The oldest usable Firecracker. Version 1.16.0 loses vsock in a restore.
pub const MINIMUM: Version = Version(1, 16, 1);

/// How long Firecracker may take to report its version.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A version, such as `1.16.1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u16, u16, u16);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl FromStr for Version {
    type Err = ();

    /// Parses three numbers, and ignores everything after them.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut numbers = text.split('.').map(|part| {
            part.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok())
        });
        let mut next = || numbers.next().flatten().ok_or(());
        Ok(Self(next()?, next()?, next()?))
    }
}

/// Firecracker cannot be used on this host.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The program is not installed.
    #[error("`{}` is not installed", program.display())]
    NotInstalled {
        /// The program.
        program: PathBuf,
    },
    /// The program does not report its version.
    #[error("`{}` does not report its version", program.display())]
    Silent {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program is older than [`MINIMUM`].
    #[error(
        "`{}` is version {found}, but must be {MINIMUM} or newer: older versions lose vsock in a restore",
        program.display()
    )]
    TooOld {
        /// The program.
        program: PathBuf,
        /// The program's version.
        found: Version,
    },
    /// The daemon is root, and the jailer is not installed.
    #[error("the jailer `{}` is not installed; a daemon that is root needs it", jailer.display())]
    NoJailer {
        /// The jailer.
        jailer: PathBuf,
    },
    /// The program needs shared libraries, which do not exist in its jail.
    #[error("`{}` is not statically linked, so it cannot run in a jail", program.display())]
    NotStatic {
        /// The program.
        program: PathBuf,
    },
}

/// A usable Firecracker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Path of the program.
    pub program: PathBuf,
    /// The program's version.
    pub version: Version,
    /// Path of the jailer, if this process is root.
    pub jailer: Option<PathBuf>,
}

/// Looks up `program`, a path or a name, and checks its version. If this process is root, also
/// looks up its jailer: `jailer`, a path or a name, or otherwise a program beside `program` or on
/// the `PATH`.
///
/// # Errors
///
/// Returns why Firecracker cannot be used.
pub async fn check(program: &Path, jailer: Option<&Path>) -> Result<Found, Unusable> {
    let found =
        look_up(program).ok_or_else(|| Unusable::NotInstalled { program: program.to_owned() })?;
    let version = check_version(&found).await?;
    let jailer =
        geteuid().is_root().then(|| blocking(|| check_jail(&found, jailer))).transpose()?;
    Ok(Found { program: found, version, jailer })
}

async fn check_version(program: &Path) -> Result<Version, Unusable> {
    let silent = |source| Unusable::Silent { program: program.to_owned(), source };
    let asked = bhatti_host::process::command(program).arg("--version").output();
    let output = timeout(ANSWER_LIMIT, asked)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(silent)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().find_map(|word| word.strip_prefix('v')?.parse().ok());
    let version = version.ok_or_else(|| silent(io::ErrorKind::InvalidData.into()))?;
    if version < MINIMUM {
        return Err(Unusable::TooOld { program: program.to_owned(), found: version });
    }
    Ok(version)
}

/// Finds the jailer for `program`, which must be able to run in a jail.
fn check_jail(program: &Path, jailer: Option<&Path>) -> Result<PathBuf, Unusable> {
    if !is_static(program).unwrap_or(false) {
        return Err(Unusable::NotStatic { program: program.to_owned() });
    }
    let jailer = jailer.map_or_else(
        || {
            let beside = program.with_file_name(JAILER);
            if beside.is_file() { beside } else { JAILER.into() }
        },
        Path::to_owned,
    );
    look_up(&jailer).ok_or(Unusable::NoJailer { jailer })
}

/// Whether a program runs without any other file: whether its ELF file (elf(5), 64-bit and
/// little-endian, as on all supported architectures) names no interpreter.
fn is_static(program: &Path) -> io::Result<bool> {
    const MAGIC: &[u8] = b"\x7fELF";
    const PT_INTERP: u32 = 3;
    let mut header = [0; 64];
    let file = File::open(program)?;
    file.read_exact_at(&mut header, 0)?;
    if !header.starts_with(MAGIC) {
        return Ok(false);
    }
    let u16_at = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (size, count) = (u16_at(54), u16_at(56));
    let table = u64::from_le_bytes(header[32..40].try_into().map_err(io::Error::other)?);
    for number in 0..count {
        let mut kind = [0; 4];
        file.read_exact_at(&mut kind, table.saturating_add(number * size))?;
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(false);
        }
    }
    Ok(true)
}

fn look_up(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        let program = std::path::absolute(program).ok()?;
        return program.is_file().then_some(program);
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
        check_version(&program).await
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
        let none = check(Path::new("/nowhere/firecracker"), None).await.unwrap_err();
        assert!(matches!(none, Unusable::NotInstalled { .. }));
    }

    #[test]
    fn jailer_is_found_beside_a_static_program() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name);
        std::fs::copy("/bin/sh", place("dynamic")).unwrap();
        std::fs::write(place("script"), "#!/bin/sh\n").unwrap();
        for bad in ["dynamic", "script"] {
            let error = check_jail(&place(bad), None).unwrap_err();
            assert!(matches!(error, Unusable::NotStatic { .. }), "{bad}: {error}");
        }
        std::fs::copy(bhatti_testkit::dist("lohar"), place("static")).unwrap();
        let none = check_jail(&place("static"), Some(&place("jailer"))).unwrap_err();
        assert!(matches!(none, Unusable::NoJailer { .. }), "{none}");

        std::fs::write(place("jailer"), "").unwrap();

        assert_eq!(check_jail(&place("static"), None).unwrap(), place("jailer"));
    }
}
