//! `cargo xtask tidy`: checks rules that the compiler does not check.
//!
//! - [`sizes`]: files and functions are short.
//! - [`layers`]: a crate depends only on rows below its own in ARCHITECTURE.md's table.
//! - [`circles`]: the modules of a crate do not import each other in circles.
//! - [`blocking`]: asynchronous code does not wait for a disk on a worker thread.
//! - [`columns`]: comments and Markdown end at 100 columns.
//! - here: module docs, and invariants of ARCHITECTURE.md that forbid something.

mod blocking;
mod circles;
mod columns;
mod layers;
mod sizes;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A text file of the repository.
struct File {
    /// The path below the repository's root.
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        Path::new(&self.path).extension().is_some_and(|extension| extension == "rs")
    }

    /// Whether the file holds nothing but tests.
    fn is_test(&self) -> bool {
        self.path.contains("/tests/") || self.path.ends_with("/tests.rs")
    }

    /// Returns the text without the tests at the end.
    fn code(&self) -> &str {
        self.text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(&self.text)
    }
}

/// What is wrong, one line for each finding.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    fn add(&mut self, path: &str, finding: &str) {
        self.0.push(format!("{path}: {finding}"));
    }
}

/// Checks the tree and prints the sizes of files and functions.
pub(crate) fn run() -> Result<()> {
    let root = bhatti_testkit::repository().canonicalize()?;
    let files = read_files(&root)?;
    let mut findings = Findings::default();
    for file in files.iter().filter(|file| file.path.starts_with("crates/")) {
        check_invariants(file, &mut findings);
    }
    columns::check(&files, &mut findings);
    layers::check(&files, &mut findings)?;
    circles::check(&files, &mut findings);
    blocking::check(&files, &mut findings)?;
    let sizes = sizes::check(&files, &mut findings);
    let Findings(findings) = findings;
    if findings.is_empty() {
        println!("tidy: {} files, no findings; {sizes}", files.len());
        return Ok(());
    }
    bail!("tidy: {} findings\n{}", findings.len(), findings.join("\n"))
}

/// Reads the files that git tracks or would track.
fn read_files(root: &Path) -> Result<Vec<File>> {
    let listed = bhatti_host::process::command("git")
        .into_std()
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("failed to run git")?;
    let names = String::from_utf8(listed.stdout).context("a file's name is not text")?;
    let mut files = Vec::new();
    for name in names.lines().filter(|name| is_checked(name)) {
        let path: PathBuf = root.join(name);
        // A file that was deleted and not committed yet is still listed.
        if path.is_file() {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("failed to read `{}`", path.display()))?;
            files.push(File { path: name.to_owned(), text });
        }
    }
    Ok(files)
}

fn is_checked(name: &str) -> bool {
    const GENERATED: [&str; 2] = ["crates/bhatti-server/console/", "web/package-lock.json"];
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    let is_text = matches!(extension, Some("rs" | "toml" | "md" | "sh" | "ts" | "tsx" | "py"));
    let is_text = is_text || matches!(name, "Makefile" | ".ci/run");
    is_text && !GENERATED.iter().any(|generated| name.starts_with(generated))
}

fn check_invariants(file: &File, findings: &mut Findings) {
    let File { path, text } = file;
    if path.ends_with("Cargo.toml") {
        if text.contains("rusqlite") && !path.starts_with("crates/bhatti-store/") {
            findings.add(path, "SQL belongs in bhatti-store alone");
        }
        return;
    }
    if !file.is_rust() {
        return;
    }
    if !file.is_test() {
        if !text.starts_with("//!") {
            findings.add(path, "does not begin with module documentation");
        }
        // A registry's statuses are its own.
        let knows_statuses = path == "crates/bhatti-server/src/status.rs"
            || path == "crates/bhatti-e2b/src/status.rs"
            || path.starts_with("crates/bhatti-registry/")
            || path.starts_with("crates/xtask/");
        if file.code().contains("StatusCode::") && !knows_statuses {
            findings.add(
                path,
                "HTTP statuses belong in the `status.rs` of bhatti-server and bhatti-e2b alone",
            );
        }
    }
    if text.contains("#[ignore") && !path.starts_with("crates/xtask/") {
        findings.add(path, "a test is ignored");
    }
}
