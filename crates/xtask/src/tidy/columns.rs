//! Comments and Markdown end at 100 columns. rustfmt does not wrap them.

use super::{File, Findings};

const COLUMNS_MAX: usize = 100;

/// Finds lines that are too long.
pub(super) fn check(files: &[File], findings: &mut Findings) {
    for file in files {
        let is_markdown = file.path.ends_with(".md");
        let mut is_code_block = false;
        for (line, number) in file.text.lines().zip(1..) {
            is_code_block ^= line.trim_start().starts_with("```");
            let counts =
                if is_markdown { is_prose(line) && !is_code_block } else { is_comment(file, line) };
            let columns = line.chars().count();
            if counts && columns > COLUMNS_MAX {
                let path = format!("{}:{number}", file.path);
                findings.add(&path, &format!("{columns} columns, more than {COLUMNS_MAX}"));
            }
        }
    }
}

/// Whether a line of Markdown can be wrapped: rows of tables and links without spaces cannot.
fn is_prose(line: &str) -> bool {
    let text = line.trim_start();
    let words = text.trim_start_matches(['-', '*', '>', ' ']).split_whitespace().count();
    !text.starts_with('|') && words > 1
}

fn is_comment(file: &File, line: &str) -> bool {
    let text = line.trim_start();
    let is_script_comment = || text.starts_with("# ") || text == "#";
    let path = &file.path;
    let has_slashes = [".rs", ".ts", ".tsx"].iter().any(|extension| path.ends_with(extension));
    if has_slashes { text.starts_with("//") || text.starts_with("* ") } else { is_script_comment() }
}
