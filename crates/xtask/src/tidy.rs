//! Checks what compilers do not: proportions, module docs, and the invariants of ARCHITECTURE.md that are things absent.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Lines of a source file without its tests: beyond this it fails.
const FILE_LINES_MAX: usize = 600;

/// Checks the tree.
pub(crate) fn run() -> Result<()> {
    let crates = bhatti_testkit::repository().join("crates");
    let mut files = Vec::new();
    find(&crates, &mut files)?;
    let mut findings = Vec::new();
    for file in &files {
        check(file, &crates, &mut findings)
            .with_context(|| format!("failed to read {}", file.display()))?;
    }
    if findings.is_empty() {
        println!("tidy: {} files, nothing to say", files.len());
        return Ok(());
    }
    bail!("tidy:\n{}", findings.join("\n"))
}

fn find(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "toml")
        {
            files.push(path);
        }
    }
    Ok(())
}

fn check(file: &Path, crates: &Path, findings: &mut Vec<String>) -> Result<()> {
    let text = fs::read_to_string(file)?;
    let name = file.strip_prefix(crates)?.to_string_lossy().into_owned();
    let mut found = |what: &str| findings.push(format!("crates/{name}: {what}"));
    if name.ends_with("Cargo.toml") {
        if text.contains("rusqlite") && !name.starts_with("bhatti-store/") {
            found("SQL belongs in bhatti-store alone");
        }
        return Ok(());
    }
    let is_test = name.contains("/tests/") || name.ends_with("/tests.rs");
    if !is_test {
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(&text);
        if code.lines().count() > FILE_LINES_MAX {
            found("longer than 600 lines");
        }
        if !text.starts_with("//!") {
            found("does not begin with module documentation");
        }
        if code.contains("StatusCode::")
            && name != "bhatti-server/src/status.rs"
            && !name.starts_with("xtask/")
        {
            found("HTTP statuses belong in bhatti-server/src/status.rs alone");
        }
    }
    if text.contains("#[ignore") && !name.starts_with("xtask/") {
        found("a test is ignored");
    }
    Ok(())
}
