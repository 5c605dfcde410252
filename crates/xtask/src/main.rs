//! The developers' own commands.
//!
//! `cargo xtask tidy` checks what compilers do not; `cargo xtask openapi` writes down the description of the API;
//! `cargo xtask bench` prints the figures that the project promises, `cargo xtask compare` those of others beside them; `cargo xtask kvm-lab` runs a command on a host with KVM, which it makes
//! where this one has none. `cargo xtask power-loss` cuts the power of a recorded daemon at many points.
#![expect(clippy::print_stdout, reason = "a command line prints")]

mod bench;
mod compare;
mod kvm_lab;
mod openapi;
mod power_loss;
mod tidy;

use anyhow::{Result, bail};
use tracing_subscriber::filter::LevelFilter;

fn main() -> Result<()> {
    // What engines and stores complain of.
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(LevelFilter::WARN).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((first, rest)) = arguments.split_first()
        && first == "kvm-lab"
    {
        std::process::exit(kvm_lab::start(rest)?);
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "power-loss"
    {
        return power_loss::run(rest);
    }
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => tidy::run(),
        ["openapi"] => openapi::run(),
        ["bench"] => bench::run(None),
        ["bench", "check"] => bench::check(false),
        ["bench", "check", "--record"] => bench::check(true),
        ["bench", "work", what, times] => bench::work(what, times.parse()?),
        ["bench", "base"] => bench::beside(None),
        ["bench", "base", revision] => bench::beside(Some(revision)),
        ["compare"] => compare::compare(),
        ["bench", only @ ("api" | "files" | "forks")] => bench::run(Some(only)),
        _ => bail!(
            "usage: cargo xtask tidy | openapi | bench [api | files | forks | base [REVISION] | check [--record]] | compare | power-loss [OPTION]... | kvm-lab [--with PATH | --env NAME=VALUE]... -- COMMAND"
        ),
    }
}
