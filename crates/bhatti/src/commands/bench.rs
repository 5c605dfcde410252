//! `bhatti bench`.

mod figures;
mod plot;
mod section;

use std::path::PathBuf;

use bhatti_api::{ErrorCode, Health};
use bhatti_client::{Client, ClientError};
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::error::CliError;
use figures::{FIGURES, Figures, Machine};
use section::Section;

/// The options of `bench`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti bench\n  bhatti bench --only create,exec --samples 100 --json\n  bhatti bench --samples 100 --plot bench.svg\n\nCreates its own sandboxes and destroys them.\n  create    create a sandbox and run a command, two seconds after the previous sample\n  burst     as create, without the pause\n  file      write and read 1 MiB\n  pause     pause and resume a sandbox\n  wake      run a command in a paused sandbox\n  start     start a stopped sandbox and run a command\nThe host's caches are not dropped. A 99th percentile needs 100 samples."
)]
pub(crate) struct Bench {
    /// Sections to run, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', value_parser = Section::NAMES)]
    only: Vec<String>,
    /// Samples per section, after an uncounted warm-up
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    samples: u32,
    /// SVG file to write a plot of the distributions to
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// The results of a benchmark, and the daemon and machine that they are from.
#[derive(Debug, Serialize)]
struct Report {
    version: String,
    engine: String,
    accelerator: String,
    /// The machine that ran the benchmark. It is the daemon's machine if the client used the
    /// daemon's socket.
    machine: Machine,
    figures: Vec<Figures>,
    skipped: Vec<Skipped>,
}

/// A section that the daemon does not support.
#[derive(Debug, Serialize)]
struct Skipped {
    what: &'static str,
    why: String,
}

pub(crate) async fn run(context: &Context, arguments: &Bench) -> Result<(), CliError> {
    let Health { version, engine, accelerator, .. } = context.client.health().await?;
    let mut report = Report {
        version,
        engine,
        accelerator,
        machine: Machine::this()?,
        figures: Vec::new(),
        skipped: Vec::new(),
    };
    context.output.note(&report.heading());
    let wanted = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|o| o == name);
    for (section, what) in Section::ALL.into_iter().zip(Section::NAMES) {
        if !wanted(what) {
            continue;
        }
        context.output.note(what);
        match measure(&context.client, section, arguments.samples).await {
            Ok(times) => report.figures.push(Figures::of(what, times)),
            Err(ClientError::Refused(refused)) if refused.code == ErrorCode::Unsupported => {
                report.skipped.push(Skipped { what, why: refused.error });
            }
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(path) = &arguments.plot {
        plot::draw(path, &report.heading(), &report.figures)?;
    }
    if context.output.json {
        return context.output.show(&report, |_| String::new());
    }
    context.output.show_list(&report.figures, &FIGURES)?;
    for Skipped { what, why } in &report.skipped {
        context.output.tell(&format!("SKIPPED: {what}, because {why}"));
    }
    Ok(())
}

impl Report {
    /// Describes the daemon and the machine in one line.
    fn heading(&self) -> String {
        let Self { version, engine, accelerator, machine, .. } = self;
        format!("bhatti {version}, {engine} ({accelerator}); {machine}")
    }
}

/// Measures one section, and returns its times.
async fn measure(
    client: &Client,
    section: Section,
    samples: u32,
) -> Result<Vec<std::time::Duration>, ClientError> {
    let sandbox = client.create(&section::own_sandbox()).await?.id;
    let mut times = Vec::new();
    let mut failed = None;
    for sample in 0..=samples {
        match section.once(client, &sandbox).await {
            // The first sample is the warm-up.
            Ok(time) if sample > 0 => times.push(time),
            Ok(_) => {}
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    // The benchmark's sandbox is destroyed even if a sample failed.
    client.destroy(&sandbox).await?;
    failed.map_or(Ok(times), Err)
}
