//! Commands for developers.
//!
//! - `cargo xtask tidy` checks rules that the compiler does not check.
//! - `cargo xtask openapi` writes the description of the API.
//! - `cargo xtask bench` measures and prints the project's promised figures.
//! - `cargo xtask compare` measures Docker, QEMU alone and the host beside bhatti.
//! - `cargo xtask kvm-lab` runs a command in a VM with KVM, for hosts without KVM.
//! - `cargo xtask power-loss` cuts the power of a recorded daemon at many points.
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
    // Shows warnings of engines and stores.
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
    if cfg!(debug_assertions)
        && arguments.first().is_some_and(|first| ["bench", "compare"].contains(&first.as_str()))
    {
        return run_optimized(&arguments);
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

/// Runs an optimized build of this program, because benchmarks measure optimized code.
fn run_optimized(arguments: &[String]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    #[expect(clippy::disallowed_methods, reason = "cargo needs the caller's environment")]
    let status = std::process::Command::new(cargo)
        .args(["run", "--release", "--quiet", "--package", "xtask", "--"])
        .args(arguments)
        .status()?;
    std::process::exit(status.code().unwrap_or(1))
}
