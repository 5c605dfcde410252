//! The modules of a crate do not import each other in circles.
//!
//! A module here is a file directly below `src` with all files below its directory. The crate's
//! root is left out: it declares the modules and shows their items, and the modules may use what
//! is declared in it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{File, Findings};

/// The imports of each module of a crate.
type Imports<'a> = BTreeMap<&'a str, BTreeSet<&'a str>>;

/// Finds circles of imports.
pub(super) fn check(files: &[File], findings: &mut Findings) {
    let mut crates: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    for file in files.iter().filter(|file| file.is_rust() && !file.is_test()) {
        let Some(path) = file.path.strip_prefix("crates/") else { continue };
        let Some((name, path)) = path.split_once("/src/") else { continue };
        crates.entry(name).or_default().push((path, file.code()));
    }
    for (name, files) in crates {
        for circle in circles(&imports(&files)) {
            let circle = circle.join(" -> ");
            findings
                .add(&format!("crates/{name}"), &format!("modules import in circles: {circle}"));
        }
    }
}

fn module_of(path: &str) -> &str {
    path.split('/').next().unwrap_or(path).trim_end_matches(".rs")
}

fn is_root(path: &str) -> bool {
    matches!(path, "lib.rs" | "main.rs")
}

fn imports<'a>(files: &[(&'a str, &'a str)]) -> Imports<'a> {
    let modules: BTreeSet<&str> =
        files.iter().filter(|(path, _)| !is_root(path)).map(|(path, _)| module_of(path)).collect();
    let roots = files.iter().filter(|(path, _)| is_root(path));
    let shown: HashMap<&str, &str> = roots.flat_map(|(_, text)| shown(text, &modules)).collect();
    let mut imports = Imports::new();
    for (path, text) in files.iter().filter(|(path, _)| !is_root(path)) {
        let own = module_of(path);
        let names = paths_from_root(path, text);
        let targets = names.filter_map(|name| {
            let module = modules.get(name).copied();
            module.or_else(|| shown.get(name).copied())
        });
        imports.entry(own).or_default().extend(targets.filter(|target| *target != own));
    }
    imports
}

/// Returns the items that a crate's root shows, with the module that each is from.
fn shown<'a>(root: &'a str, modules: &BTreeSet<&'a str>) -> Vec<(&'a str, &'a str)> {
    let uses = root.split("use ").skip(1).filter_map(|tail| tail.split(';').next());
    let mut items = Vec::new();
    for tree in uses {
        let Some((first, rest)) = tree.split_once("::") else { continue };
        if let Some(module) = modules.get(first) {
            items.extend(words(rest).map(|item| (item, *module)));
        }
    }
    items
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// Returns the first segments of all paths that begin at the crate's root: `crate::x`, and
/// `super::x` in a file directly below `src`.
fn paths_from_root<'a>(path: &str, text: &'a str) -> impl Iterator<Item = &'a str> {
    let is_top = !path.contains('/');
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let starts: &[&str] = if is_top { &["crate::", "super::"] } else { &["crate::"] };
    let mut found = Vec::new();
    for line in lines {
        for start in starts {
            found.extend(line.match_indices(start).map(|(at, _)| &line[at + start.len()..]));
        }
    }
    // A tree over several lines: its first segments are in the lines that follow.
    let trees = text.split("use crate::{").skip(1).filter_map(|tail| tail.split("};").next());
    found.into_iter().filter_map(|rest| words(rest).next()).chain(trees.flat_map(first_segments))
}

/// Returns the first segments of the paths in the braces of a `use`.
fn first_segments(tree: &str) -> Vec<&str> {
    let (mut depth, mut start, mut segments) = (0, 0, Vec::new());
    for (at, c) in tree.char_indices().chain([(tree.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                segments.extend(words(&tree[start..at]).next());
                start = at + 1;
            }
            _ => {}
        }
    }
    segments
}

/// Returns one circle through each module that is in one, each circle once.
fn circles<'a>(imports: &Imports<'a>) -> Vec<Vec<&'a str>> {
    let mut found: Vec<Vec<&str>> = Vec::new();
    for start in imports.keys() {
        if found.iter().any(|circle| circle.contains(start)) {
            continue;
        }
        found.extend(path_back(imports, start));
    }
    found
}

/// Returns the shortest path from a module back to itself.
fn path_back<'a>(imports: &Imports<'a>, start: &'a str) -> Option<Vec<&'a str>> {
    let mut paths = std::collections::VecDeque::from([vec![start]]);
    let mut seen = BTreeSet::new();
    while let Some(path) = paths.pop_front() {
        let last = path.last().copied().unwrap_or(start);
        for next in imports.get(last).into_iter().flatten() {
            let longer = [path.clone(), vec![*next]].concat();
            if *next == start {
                return Some(longer);
            }
            if seen.insert(*next) {
                paths.push_back(longer);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles_of(files: &[(&str, &str)]) -> Vec<String> {
        circles(&imports(files)).iter().map(|circle| circle.join(" ")).collect()
    }

    #[test]
    fn circle_is_found_through_any_form_of_import() {
        for import in [
            "use crate::b::B;",
            "use crate::{\n    a::A,\n    b::{B, C},\n};",
            "use super::b;",
            "fn f() { crate::b::g() }",
            "use crate::B;",
        ] {
            let root = "mod a;\nmod b;\npub use b::{B, C};\n";
            let files = [("lib.rs", root), ("a.rs", import), ("b/c.rs", "use crate::a::A;")];
            assert_eq!(circles_of(&files), ["a b a"], "{import}");
        }
    }

    #[test]
    fn imports_in_one_direction_are_no_circle() {
        let files = [
            ("lib.rs", "mod a;\nmod b;\nmod c;\nstruct Shared;\n"),
            ("a.rs", "use crate::{Shared, b, c};\n// use crate::a"),
            ("b.rs", "use crate::c::C;\nuse crate::Shared;"),
            ("c.rs", "use crate::Shared;\nmod own;"),
            ("c/own.rs", "use super::C;"),
        ];
        assert_eq!(circles_of(&files), [""; 0]);
    }
}
