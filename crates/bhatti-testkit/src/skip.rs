//! Tests that cannot run here say so, and are counted.

use std::fs::OpenOptions;
use std::io::Write;

use crate::repository;

/// Says that `what` did not run, and why. `scripts/test.sh` prints and counts these at the end.
///
/// # Panics
///
/// Panics if it cannot be said: a silent skip is a defect.
pub fn skip(what: &str, why: &str) {
    let path = repository().join("target/skipped.txt");
    let mut file =
        OpenOptions::new().create(true).append(true).open(path).expect("the list can be written");
    writeln!(file, "SKIPPED: {what}, because {why}").expect("the list can be written");
}
