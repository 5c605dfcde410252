//! Root file systems: Debian, assembled by mmdebstrap, in an ext4 file written by `mke2fs -d`.
//! Nothing is mounted.

use bhatti_host::blocking;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::apt::{self, AptError};
use crate::archive::LayerFile;
use crate::certificates::{CertificateError, Certificates, TRUST};
use crate::ext4::{Ext4Builder, Ext4Error};
use crate::tool::{ToolError, run};

/// The Debian release of images.
const SUITE: &str = "bookworm";

/// Packages of the minimal image beyond the smallest Debian.
const PACKAGES: &str = "ca-certificates,curl,git,procps,iproute2,sudo,python3";

/// The Debian release of the image `builder`. Buildah of the release before does not know here
/// documents, and takes their lines for instructions.
const BUILDER_SUITE: &str = "trixie";

/// Packages of the image `builder` beyond the smallest Debian. Buildah does not start without
/// netavark, even if it makes no network.
const BUILDER_PACKAGES: &str = "ca-certificates,procps,iproute2,sudo,buildah,netavark";

/// Packages of the image `dev` beyond the minimal image: the first tools that coding agents and
/// developers need.
const DEV_PACKAGES: [&str; 16] = [
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

/// Packages of the image `code-interpreter` beyond the minimal image: Jupyter's kernel of Python,
/// the other languages, and what programs that analyze data expect.
const INTERPRETER_PACKAGES: [&str; 14] = [
    "python3-ipykernel",
    "python3-pip",
    "python3-numpy",
    "python3-pandas",
    "python3-matplotlib",
    "python3-pil",
    "python3-scipy",
    "python3-sklearn",
    "python3-sympy",
    "python3-requests",
    "python3-bs4",
    "python3-openpyxl",
    "nodejs",
    "node-typescript",
];

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
    /// The file system could not be written.
    #[error("failed to write the root file system")]
    Write(#[source] Ext4Error),
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

/// The Debian that an image has.
#[derive(Clone, Debug)]
pub(crate) struct Debian {
    suite: &'static str,
    /// Packages beyond the smallest Debian, separated by commas.
    packages: String,
}

impl Debian {
    /// The minimal image with more packages.
    pub(crate) fn with(more: &[String]) -> Self {
        let packages = std::iter::once(PACKAGES).chain(more.iter().map(String::as_str));
        Self { suite: SUITE, packages: packages.collect::<Vec<_>>().join(",") }
    }

    /// The image for development.
    pub(crate) fn dev() -> Self {
        Self::with(&DEV_PACKAGES.map(str::to_owned))
    }

    /// The image that runs code in Jupyter's kernels.
    pub(crate) fn interpreter() -> Self {
        Self::with(&INTERPRETER_PACKAGES.map(str::to_owned))
    }

    /// The image that builds others.
    pub(crate) fn builder() -> Self {
        Self { suite: BUILDER_SUITE, packages: BUILDER_PACKAGES.to_owned() }
    }

    /// Returns the recipe of an image. Images with different recipes are different images.
    pub(crate) fn recipe(&self, certificates: &Certificates) -> Result<String, CertificateError> {
        Ok(format!(
            "{RECIPE}{} minbase {} 4G {}{}",
            self.suite,
            self.packages,
            blake3::hash(CUSTOMIZE.as_bytes()).to_hex(),
            certificates.recipe()?
        ))
    }
}

/// Whether an image's source is a recipe and not an imported archive.
pub(crate) fn is_recipe(source: &str) -> bool {
    source.starts_with(RECIPE)
}

/// Builds a Debian image in `scratch` and returns its file. `unpacker` is the program that unpacks
/// archives.
pub(crate) async fn build_debian(
    unpacker: &Path,
    scratch: &Path,
    debian: &Debian,
    certificates: &Certificates,
    line: &mut (dyn FnMut(&str) + Send),
) -> Result<PathBuf, RootfsError> {
    let sources = apt::sources_for(debian.suite).await.map_err(RootfsError::Mirror)?;
    let (tar, image, customize) =
        (scratch.join("root.tar"), scratch.join("root.ext4"), scratch.join("customize"));
    blocking(|| write_program(&customize, CUSTOMIZE))
        .map_err(|source| RootfsError::Create { path: customize.clone(), source })?;
    let tar_text = tar.to_string_lossy();
    let hook = format!("--customize-hook={}", customize.display());
    let trust_hook = blocking(|| trust(scratch, certificates))?;
    let include = format!("--include={}", debian.packages);
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
    arguments.extend([debian.suite, &tar_text]);
    arguments.extend(sources.iter().map(String::as_str));
    let failed = |step| move |source| RootfsError::Build { step, source };
    // mmdebstrap's own messages have this prefix; all other lines are output of the packages'
    // scripts.
    let mut own_messages = |text: &str| text.strip_prefix("I: ").map_or((), &mut *line);
    run(program, &arguments, scratch, &mut own_messages)
        .await
        .map_err(failed("assemble the root file system"))?;
    line("writing the file system");
    let layer = blocking(|| File::open(&tar).and_then(LayerFile::whole))
        .map_err(|source| RootfsError::Create { path: tar.clone(), source })?;
    write_image(unpacker, scratch, &layer, &image).await.map_err(RootfsError::Write)?;
    Ok(image)
}

async fn write_image(
    unpacker: &Path,
    scratch: &Path,
    layer: &LayerFile,
    image: &Path,
) -> Result<(), Ext4Error> {
    let mut builder = blocking(|| Ext4Builder::new(unpacker, scratch, None))?;
    builder.apply(layer).await?;
    builder.write(image, true).await
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
