//! The developers' own commands.
//!
//! `cargo xtask tidy` checks what compilers do not; `cargo xtask openapi` writes down the description of the API;
//! `cargo xtask bench` prints the figures that the project promises.
#![expect(clippy::print_stdout, reason = "a command line prints")]

mod bench;
mod openapi;
mod tidy;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => tidy::run(),
        ["openapi"] => openapi::run(),
        ["bench"] => bench::run(None),
        ["bench", only @ ("api" | "forks")] => bench::run(Some(only)),
        _ => bail!("usage: cargo xtask tidy | openapi | bench [api | forks]"),
    }
}
