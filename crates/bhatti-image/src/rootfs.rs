//! Root file systems: Debian, assembled by mmdebstrap, in an ext4 file written by `mke2fs -d`.
//! Nothing is mounted.

use bhatti_host::blocking;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::apt::{self, AptError};
use crate::certificates::{CertificateError, Certificates, TRUST};
use crate::tool::{ToolError, run, run_quietly};

/// The Debian release of the image.
const SUITE: &str = "bookworm";

/// Packages of the minimal image beyond the smallest Debian.
const PACKAGES: &str = "ca-certificates,curl,git,procps,iproute2,sudo,python3";

/// Packages of the image `dev` beyond the minimal image: the first tools that coding agents and
/// developers need.
pub(crate) const DEV_PACKAGES: [&str; 16] = [
    "build-essential",
    "pkg-config",
    "python3-dev",
    "python3-pip",
    "python3-venv",
    "nodejs",
    "npm",
    "openssh-client",
    "less",
    "nano",
    "wget",
    "zip",
    "unzip",
    "xz-utils",
    "jq",
    "iputils-ping",
];

/// The size of the file system, in MiB; its file is sparse.
pub(crate) const DISK_MIB: u32 = 4096;

/// Adds the parts that a guest needs and no package brings: the user of every command, a working
/// directory, and no identity of this build.
const CUSTOMIZE: &str = r#"#!/bin/sh
set -e
chroot "$1" useradd --create-home --uid 1000 --shell /bin/bash --user-group user
echo 'user ALL=(ALL) NOPASSWD:ALL' >"$1/etc/sudoers.d/user"
chmod 0440 "$1/etc/sudoers.d/user"
mkdir -p "$1/workspace" "$1/root-disk"
rmdir "$1/root-disk"
chown 1000:1000 "$1/workspace"
echo bhatti >"$1/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$1/etc/hosts"
: >"$1/etc/machine-id"
rm -f "$1/etc/resolv.conf"
printf 'nameserver 1.1.1.1\nnameserver 8.8.8.8\n' >"$1/etc/resolv.conf"
"#;

/// Makes the file `$2` of size `$3` from the tar `$1`. `mke2fs` initializes all tables now: a
/// guest that finished this work lazily would dirty its own pages. The tree may be untrusted, so
/// the script follows and writes through nothing in it. Directories that the archive only implies
/// can be entered by every user, regardless of the caller's umask.
///
/// Only the shell is our child. The parent-death signal ends `tar` and `mke2fs` with it
/// (PR_SET_PDEATHSIG in prctl(2)).
const MAKE_EXT4: &str = r#"set -e
before=$(umask)
umask 022
mkdir root
setpriv --pdeathsig KILL -- tar -C root --numeric-owner --xattrs --xattrs-include="*" -xf "$1"
[ -n "$(ls -A root)" ] || { echo 'the archive is empty' >&2; exit 1; }
[ -e root/workspace ] || [ -L root/workspace ] || { mkdir root/workspace; chown 1000:1000 root/workspace; }
umask "$before"
setpriv --pdeathsig KILL -- mke2fs -q -t ext4 -m 0 -J size=16 -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 -d root "$2" "$3"
"#;

/// Keeps mmdebstrap from leaving anything behind, however this process ends: it dies with this
/// process, and has a private mount namespace.
const CONFINEMENT: [&str; 11] = [
    "--pdeathsig",
    "KILL",
    "--",
    "unshare",
    "--mount",
    "--propagation",
    "private",
    "--pid",
    "--fork",
    "--kill-child",
    "mmdebstrap",
];

/// A root file system could not be built.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Apt did not list the machine's mirrors.
    #[error("failed to find a Debian mirror")]
    Mirror(#[source] AptError),
    /// A program failed.
    #[error("failed to {step}")]
    Build {
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: ToolError,
    },
    /// The certificates to trust could not be used.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// A file could not be created.
    #[error("failed to create `{}`", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Prefix of a recipe.
const RECIPE: &str = "debian ";

/// Returns the recipe of an image. Images with different recipes are different images.
pub(crate) fn recipe(
    more_packages: &[String],
    certificates: &Certificates,
) -> Result<String, CertificateError> {
    Ok(format!(
        "{RECIPE}{SUITE} minbase {} 4G {}{}",
        packages(more_packages),
        blake3::hash(CUSTOMIZE.as_bytes()).to_hex(),
        certificates.recipe()?
    ))
}

/// Whether an image's source is a recipe and not an imported archive.
pub(crate) fn is_recipe(source: &str) -> bool {
    source.starts_with(RECIPE)
}

/// The packages that all images have, and those of this one.
fn packages(more: &[String]) -> String {
    std::iter::once(PACKAGES).chain(more.iter().map(String::as_str)).collect::<Vec<_>>().join(",")
}

/// Builds a Debian image in `scratch` and returns its file.
pub(crate) async fn build_debian(
    scratch: &Path,
    more_packages: &[String],
    certificates: &Certificates,
    line: &mut (dyn FnMut(&str) + Send),
) -> Result<PathBuf, RootfsError> {
    let sources = apt::sources_for(SUITE).await.map_err(RootfsError::Mirror)?;
    let (tar, image, customize) =
        (scratch.join("root.tar"), scratch.join("root.ext4"), scratch.join("customize"));
    blocking(|| write_program(&customize, CUSTOMIZE))
        .map_err(|source| RootfsError::Create { path: customize.clone(), source })?;
    let tar_text = tar.to_string_lossy();
    let hook = format!("--customize-hook={}", customize.display());
    let trust_hook = blocking(|| trust(scratch, certificates))?;
    let include = format!("--include={}", packages(more_packages));
    let is_root = rustix::process::geteuid().is_root();
    let (program, confinement, mode) = if is_root {
        ("setpriv", &CONFINEMENT[..], "--mode=root")
    } else {
        ("setpriv", &["--pdeathsig", "KILL", "--", "mmdebstrap"][..], "--mode=fakechroot")
    };
    let mut arguments = confinement.to_vec();
    arguments.extend([
        mode,
        "--variant=minbase",
        "--format=tar",
        r#"--aptopt=Apt::Install-Recommends "false""#,
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        &include,
        &hook,
    ]);
    arguments.extend(trust_hook.as_deref());
    arguments.extend([SUITE, &tar_text]);
    arguments.extend(sources.iter().map(String::as_str));
    let failed = |step| move |source| RootfsError::Build { step, source };
    // mmdebstrap's own messages have this prefix; all other lines are output of the packages'
    // scripts.
    let mut own_messages = |text: &str| text.strip_prefix("I: ").map_or((), &mut *line);
    run(program, &arguments, scratch, &mut own_messages)
        .await
        .map_err(failed("assemble the root file system"))?;
    line("writing the file system");
    make_ext4(scratch, &tar, &image, DISK_MIB)
        .await
        .map_err(failed("write the root file system"))?;
    Ok(image)
}

/// Prepares an image to trust `certificates`. Returns the argument that makes mmdebstrap do it,
/// or `None` if there are no certificates.
fn trust(scratch: &Path, certificates: &Certificates) -> Result<Option<String>, RootfsError> {
    if certificates.is_empty() {
        return Ok(None);
    }
    certificates.copy_to(&scratch.join("ca-certificates"))?;
    let program = scratch.join("trust");
    write_program(&program, TRUST)
        .map_err(|source| RootfsError::Create { path: program.clone(), source })?;
    Ok(Some(format!("--customize-hook={}", program.display())))
}

fn write_program(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Unpacks `tar` and writes it into an ext4 file. If this process is not root, fakeroot tracks
/// the owners of files.
pub(crate) async fn make_ext4(
    scratch: &Path,
    tar: &Path,
    image: &Path,
    size_mib: u32,
) -> Result<(), ToolError> {
    let (tar, image, size) =
        (tar.to_string_lossy(), image.to_string_lossy(), format!("{size_mib}M"));
    let shell =
        ["--pdeathsig", "KILL", "--", "sh", "-c", MAKE_EXT4, "make-ext4", &tar, &image, &size];
    if rustix::process::geteuid().is_root() {
        run_quietly("setpriv", &shell, scratch).await?;
    } else {
        // If fakeroot is killed, its daemon `faked` stays. It has no files open and does nothing.
        run_quietly("fakeroot", &[&["setpriv"], &shell[..]].concat(), scratch).await?;
    }
    Ok(())
}
