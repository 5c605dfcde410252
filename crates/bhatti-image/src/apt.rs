//! Queries the machine's own apt.

use bhatti_host::blocking;
use std::fs;
use std::path::{Path, PathBuf};

use crate::tool::{ToolError, run_quietly};

/// Apt could not provide a package.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// A program of apt's could not be run, or failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Apt knows no such package.
    #[error(
        "apt knows no package `{package}`; run `apt-get update`, or give a kernel with --kernel FILE"
    )]
    UnknownPackage {
        /// The package.
        package: String,
    },
    /// Apt downloaded nothing.
    #[error("`apt-get download {package}` left no package behind")]
    NothingDownloaded {
        /// The package.
        package: String,
    },
}

/// A package at one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

/// The Debian architecture of this machine.
pub(crate) async fn architecture() -> Result<String, AptError> {
    let output = run_quietly("dpkg", &["--print-architecture"], Path::new("/")).await?;
    Ok(output.trim().to_owned())
}

/// Returns the first dependency of the newest version of the package `meta`, from any release.
pub(crate) async fn newest_dependency(meta: &str) -> Result<Package, AptError> {
    let unknown = || AptError::UnknownPackage { package: meta.to_owned() };
    let versions = run_quietly("apt-cache", &["madison", meta], Path::new("/")).await?;
    let newest = versions.lines().find_map(|line| line.split('|').nth(1)).ok_or_else(unknown)?;
    let pinned = format!("{meta}={}", newest.trim());
    let description = run_quietly("apt-cache", &["show", &pinned], Path::new("/")).await?;
    first_dependency(&description).ok_or_else(unknown)
}

/// Downloads a package into `directory`.
pub(crate) async fn download(package: &Package, directory: &Path) -> Result<PathBuf, AptError> {
    let pinned = format!("{}={}", package.name, package.version);
    run_quietly("apt-get", &["download", "-qq", &pinned], directory).await?;
    let is_archive = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let archive = blocking(|| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).find(is_archive)
    });
    archive.ok_or(AptError::NothingDownloaded { package: pinned })
}

/// Returns the lines of a sources.list for Debian's `suite` and its security updates, from the
/// mirrors that this machine uses. A mirror of one release of Debian has the others, too. Returns
/// no lines if the machine uses no mirror.
pub(crate) async fn sources_for(suite: &str) -> Result<Vec<String>, AptError> {
    let format = "$(LABEL)|$(CODENAME)|$(SUITE)|$(COMPONENT)|$(REPO_URI)";
    let listing = run_quietly(
        "apt-get",
        &["indextargets", "--format", format, "Created-By: Packages"],
        Path::new("/"),
    )
    .await?;
    let sources = parse_sources(&listing, |codename| codename == suite);
    if sources.is_empty() {
        return Ok(parse_sources(&listing, |_| true)
            .iter()
            .map(|it| of_suite(it, suite))
            .collect());
    }
    Ok(sources)
}

/// Returns a line of a sources.list with another release.
fn of_suite(line: &str, suite: &str) -> String {
    let mut words: Vec<&str> = line.split(' ').collect();
    let security = format!("{suite}-security");
    if let Some(codename) = words.get_mut(2) {
        *codename = if codename.ends_with("-security") { &security } else { suite };
    }
    words.join(" ")
}

/// Returns the lines for the releases whose names are `wanted`, and for their security updates.
fn parse_sources(listing: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let mut sources: Vec<String> = listing
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('|');
            let (label, codename, _) = (fields.next()?, fields.next()?, fields.next()?);
            let (component, uri) = (fields.next()?, fields.next()?);
            let suite = match label {
                "Debian" => codename,
                "Debian-Security" => codename.strip_suffix("-security")?,
                _ => return None,
            };
            // The names of updates and the like have a dash.
            (component == "main" && !suite.contains('-') && wanted(suite))
                .then(|| format!("deb {uri} {codename} main"))
        })
        .collect();
    sources.sort();
    sources.dedup();
    sources
}

fn first_dependency(description: &str) -> Option<Package> {
    let depends = description.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let (name, rest) = depends.split(',').next()?.split_once(" (= ")?;
    Some(Package {
        name: name.trim().to_owned(),
        version: rest.trim_end().strip_suffix(')')?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_dependency_has_name_and_version() {
        let description = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.12.9-cloud-amd64 (= 6.12.9-1~bpo12+1), x\n";

        let package = first_dependency(description).unwrap();

        assert_eq!(
            (&*package.name, &*package.version),
            ("linux-image-6.12.9-cloud-amd64", "6.12.9-1~bpo12+1")
        );
        assert_eq!(first_dependency("Package: x\n"), None);
    }

    #[test]
    fn sources_are_the_machines_own_mirrors() {
        let listing = "Debian|bookworm|oldstable|main|http://mirror/debian/\n\
            Debian|bookworm-updates|oldstable-updates|main|http://mirror/debian/\n\
            Debian-Security|bookworm-security|oldstable-security|main|http://mirror/security/\n\
            Other|bookworm|x|main|http://elsewhere/\n\
            Debian|bookworm|oldstable|main|http://mirror/debian/\n";

        let expected = [
            "deb http://mirror/debian/ bookworm main",
            "deb http://mirror/security/ bookworm-security main",
        ];
        assert_eq!(parse_sources(listing, |suite| suite == "bookworm"), expected);
        assert_eq!(parse_sources(listing, |_| true), expected);
        assert!(parse_sources(listing, |suite| suite == "trixie").is_empty());
        let other = expected.map(|line| of_suite(line, "trixie"));
        assert_eq!(
            other,
            [
                "deb http://mirror/debian/ trixie main",
                "deb http://mirror/security/ trixie-security main",
            ]
        );
    }
}
