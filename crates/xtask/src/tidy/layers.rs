//! A crate depends only on crates in rows below its own.
//!
//! The rows are those of the table under "Layers" in ARCHITECTURE.md, so the page cannot be out of
//! date.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};

use super::{File, Findings};

/// Crates beside the layers, for tests and development.
const TOOLS: [&str; 2] = ["bhatti-testkit", "xtask"];

/// Finds dependencies that do not point down, and crates that are missing in the table.
pub(super) fn check(files: &[File], findings: &mut Findings) -> Result<()> {
    let page = files.iter().find(|file| file.path == "ARCHITECTURE.md");
    let rows = rows(&page.context("ARCHITECTURE.md is missing")?.text)?;
    for file in files {
        let manifest = file.path.strip_prefix("crates/");
        let Some(name) = manifest.and_then(|path| path.strip_suffix("/Cargo.toml")) else {
            continue;
        };
        if TOOLS.contains(&name) {
            continue;
        }
        let Some(row) = rows.get(name) else {
            findings.add(&file.path, "the crate is not in ARCHITECTURE.md's table of layers");
            continue;
        };
        for dependency in dependencies(&file.text) {
            match rows.get(dependency) {
                Some(below) if below > row => {}
                _ => findings.add(&file.path, &format!("`{dependency}` is not in a row below")),
            }
        }
    }
    Ok(())
}

/// Returns the row of each crate, counted from the top.
fn rows(page: &str) -> Result<HashMap<&str, usize>> {
    let (_, section) = page.split_once("## Layers").context("the section Layers is missing")?;
    let table = section.split("```").nth(1).context("the table of layers is missing")?;
    let mut rows = HashMap::new();
    for (number, line) in table.lines().enumerate() {
        let words = line.split_whitespace();
        rows.extend(words.filter(|word| is_crate(word)).map(|name| (name, number)));
    }
    ensure!(rows.len() > 10, "the table of layers names {} crates only", rows.len());
    Ok(rows)
}

fn is_crate(word: &str) -> bool {
    word == "bhatti" || word == "lohar" || word.starts_with("bhatti-")
}

/// Returns the crates of this workspace that a manifest depends on, without those for its tests.
fn dependencies(manifest: &str) -> impl Iterator<Item = &str> {
    let sections = manifest.split("\n[").filter(|section| section.starts_with("dependencies]"));
    let lines = sections.flat_map(str::lines);
    let names = lines.filter_map(|line| line.split(['.', ' ', '=']).next());
    names.filter(|name| is_crate(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings_of(manifests: &[(&str, &str)]) -> Vec<String> {
        let many: String = (0..10).map(|n| format!(" row bhatti-{n}\n")).collect();
        let page = format!("## Layers\n```text\n up bhatti-up\n down bhatti-down\n{many}```\n");
        let mut files = vec![File { path: "ARCHITECTURE.md".to_owned(), text: page }];
        files.extend(manifests.iter().map(|(name, text)| File {
            path: format!("crates/{name}/Cargo.toml"),
            text: (*text).to_owned(),
        }));
        let mut findings = Findings::default();
        check(&files, &mut findings).unwrap();
        findings.0
    }

    #[test]
    fn dependency_must_point_down() {
        let down = "[package]\n\n[dependencies]\nbhatti-down.workspace = true\n";
        assert_eq!(findings_of(&[("bhatti-up", down)]), [""; 0]);

        let up = "[package]\n\n[dependencies]\nserde = \"1\"\nbhatti-up.workspace = true\n";
        assert_eq!(findings_of(&[("bhatti-down", up)]).len(), 1);
        assert_eq!(findings_of(&[("bhatti-up", up)]).len(), 1, "the same row is not below");
    }

    #[test]
    fn dependency_of_tests_may_point_anywhere() {
        let manifest = "[package]\n\n[dev-dependencies]\nbhatti-up.workspace = true\n";
        assert_eq!(findings_of(&[("bhatti-down", manifest)]), [""; 0]);
    }

    #[test]
    fn unknown_crate_is_found() {
        assert_eq!(findings_of(&[("bhatti-new", "")]).len(), 1);
    }
}
