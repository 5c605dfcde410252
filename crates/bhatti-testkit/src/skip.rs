//! Reports tests that cannot run here.

use std::fs::OpenOptions;
use std::io::Write;

use crate::repository;

/// Reports that `what` did not run, and why. `scripts/test.sh` prints and counts the skips at its
/// end.
///
/// # Panics
///
/// Panics if the report cannot be written: a silent skip is a defect.
pub fn skip(what: &str, why: &str) {
    let path = repository().join("target/skipped.txt");
    let mut file =
        OpenOptions::new().create(true).append(true).open(path).expect("the list can be written");
    // One write, so that lines of tests that run at once do not mix.
    let line = format!("SKIPPED: {what}, because {why}\n");
    file.write_all(line.as_bytes()).expect("the list can be written");
}
