//! Files and functions are short. Tests do not count.

use std::fmt;

use super::{File, Findings};

/// The most lines of a file, and the 90th percentile of all files.
const FILE_LINES_MAX: usize = 600;
const FILE_LINES_P90: usize = 300;

/// The 90th percentile of the functions' lines. Clippy has the maximum.
const FUNCTION_LINES_P90: usize = 25;

/// The sizes that were found.
pub(super) struct Sizes {
    files_p90: usize,
    functions_p90: usize,
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { files_p90, functions_p90 } = self;
        write!(f, "p90 of a file {files_p90} lines, of a function {functions_p90} lines")
    }
}

/// Finds files that are too long, and too many long ones.
pub(super) fn check(files: &[File], findings: &mut Findings) -> Sizes {
    let (mut of_files, mut of_functions) = (Vec::new(), Vec::new());
    let is_source =
        |file: &&File| file.is_rust() && !file.is_test() && file.path.starts_with("crates/");
    for file in files.iter().filter(is_source) {
        let lines = file.code().lines().count();
        if lines > FILE_LINES_MAX {
            findings.add(&file.path, &format!("{lines} lines, more than {FILE_LINES_MAX}"));
        }
        of_files.push(lines);
        of_functions.extend(functions(file.code()));
    }
    let sizes = Sizes { files_p90: p90(of_files), functions_p90: p90(of_functions) };
    if sizes.files_p90 > FILE_LINES_P90 {
        findings.add("files", &format!("p90 is {}, more than {FILE_LINES_P90}", sizes.files_p90));
    }
    if sizes.functions_p90 > FUNCTION_LINES_P90 {
        let p90 = sizes.functions_p90;
        findings.add("functions", &format!("p90 is {p90}, more than {FUNCTION_LINES_P90}"));
    }
    sizes
}

fn p90(mut sizes: Vec<usize>) -> usize {
    sizes.sort_unstable();
    sizes.get(sizes.len() * 9 / 10).copied().unwrap_or_default()
}

/// Returns the number of lines of each function, signature included. rustfmt puts the closing brace
/// in the column of the signature.
fn functions(code: &str) -> Vec<usize> {
    let lines: Vec<&str> = code.lines().collect();
    let mut sizes = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let text = line.trim_start();
        let indentation = &line[..line.len() - text.len()];
        if !is_signature(text) {
            continue;
        }
        let end = format!("{indentation}}}");
        let body = &lines[number..];
        let is_short = text.ends_with('}');
        let has_no_body = || {
            let first = body.iter().position(|line| line.ends_with(['{', ';']));
            first.is_some_and(|first| body[first].ends_with(';'))
        };
        if is_short {
            sizes.push(1);
        } else if !has_no_body() {
            sizes.extend(body.iter().position(|line| *line == end).map(|last| last + 1));
        }
    }
    sizes
}

/// Whether a line begins a function: `fn` after nothing but visibility and qualifiers.
fn is_signature(text: &str) -> bool {
    const BEFORE: [&str; 7] =
        ["pub", "pub(crate)", "pub(super)", "async", "const", "unsafe", "extern"];
    let mut words = text.split_whitespace().skip_while(|word| BEFORE.contains(word));
    words.next() == Some("fn")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_measured_with_their_signature() {
        let code = "fn one() {}\npub(crate) fn four(\n    a: u8,\n) {\n}\ntrait T {\n    fn none(&self);\n    \
                    fn three(&self) {\n        1;\n    }\n}\n// fn no() {\n";
        assert_eq!(functions(code), [1, 4, 3]);
    }

    #[test]
    fn percentile_is_the_size_that_nine_in_ten_do_not_exceed() {
        assert_eq!(p90((1..=10).collect()), 10);
        assert_eq!(p90((1..=100).collect()), 91);
        assert_eq!(p90(Vec::new()), 0);
    }
}
