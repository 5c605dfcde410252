//! `bhatti bench`.

use std::time::Duration;

use bhatti_api::{CreateSandbox, ExecRequest, ForkSandbox};
use bhatti_client::{Client, ClientError, Upload};
use clap::Args;
use serde::Serialize;
use tokio::time::Instant;

use super::Context;
use crate::error::CliError;
use crate::output::{Cell, Table};

/// What a file that is written and read has, in bytes.
const FILE_BYTES: usize = 1 << 20;

/// How long sandboxes of an interrupted run stay, in seconds.
const LIFETIME_SEC: u32 = 3600;

/// The fewest samples of which a 99th percentile means anything.
const P99_SAMPLES: usize = 100;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti bench\n  bhatti bench --only create,exec --samples 100 --json\n\nMakes sandboxes of its own, and destroys them. create is a creation with its first command."
)]
pub(crate) struct Bench {
    /// Only these of create, exec, file, pause, fork
    #[arg(long, value_delimiter = ',', value_parser = Section::NAMES)]
    only: Vec<String>,
    /// How often each is done, after once that does not count
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    samples: u32,
}

/// Something that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    Create,
    Exec,
    File,
    Pause,
    Fork,
}

impl Section {
    const NAMES: [&'static str; 5] = ["create", "exec", "file", "pause", "fork"];
    const ALL: [Self; 5] = [Self::Create, Self::Exec, Self::File, Self::Pause, Self::Fork];
}

/// How long something took.
#[derive(Debug, Serialize)]
struct Figures {
    what: &'static str,
    samples: usize,
    p50_ms: f64,
    p95_ms: f64,
    /// Absent where there are too few samples to tell.
    p99_ms: Option<f64>,
    max_ms: f64,
}

const FIGURES: Table<Figures> = Table {
    header: &["WHAT", "SAMPLES", "P50", "P95", "P99", "MAX"],
    row: |figures| {
        let ms = |ms: f64| Cell::from(format!("{ms:.2} ms"));
        vec![
            figures.what.into(),
            figures.samples.to_string().into(),
            ms(figures.p50_ms),
            ms(figures.p95_ms),
            figures.p99_ms.map_or_else(|| "-".into(), ms),
            ms(figures.max_ms),
        ]
    },
    key: |figures| format!("{}\t{:.2}", figures.what, figures.p50_ms),
};

pub(super) async fn run(context: &Context, arguments: &Bench) -> Result<(), CliError> {
    let client = &context.client;
    let health = client.health().await?;
    context.output.note(&format!("{} with {}", health.engine, health.accelerator));
    let wanted = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|o| o == name);
    let mut figures = Vec::new();
    for (section, name) in Section::ALL.into_iter().zip(Section::NAMES) {
        if wanted(name) {
            context.output.note(name);
            figures.push(measure(client, section, name, arguments.samples).await?);
        }
    }
    context.output.show_list(&figures, &FIGURES)
}

async fn measure(
    client: &Client,
    section: Section,
    what: &'static str,
    samples: u32,
) -> Result<Figures, CliError> {
    let sandbox = client.create(&own_sandbox()).await?.id;
    let mut times = Vec::new();
    let mut failed = None;
    for sample in 0..=samples {
        match once(client, section, &sandbox).await {
            // The first one warms up.
            Ok(time) if sample > 0 => times.push(time),
            Ok(_) => {}
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    // What was made for this goes, however it went.
    client.destroy(&sandbox).await?;
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(summary(what, times)),
    }
}

/// A sandbox that ends by itself, should nobody be left to destroy it.
fn own_sandbox() -> CreateSandbox {
    CreateSandbox { timeout_sec: Some(LIFETIME_SEC), ..CreateSandbox::default() }
}

async fn once(client: &Client, section: Section, sandbox: &str) -> Result<Duration, ClientError> {
    let began = Instant::now();
    match section {
        Section::Create => {
            let made = client.create(&own_sandbox()).await?.id;
            let ran = exec(client, &made).await.map(|()| began.elapsed());
            client.destroy(&made).await?;
            return ran;
        }
        Section::Exec => exec(client, sandbox).await?,
        Section::File => {
            let content =
                Upload::new(std::io::Cursor::new(vec![7; FILE_BYTES]), Some(FILE_BYTES as u64));
            client.write_file(sandbox, "/workspace/bench", None, content).await?;
            let mut read = client.read_file(sandbox, "/workspace/bench").await?;
            while read.next().await?.is_some() {}
        }
        Section::Pause => {
            client.pause(sandbox).await?;
            client.resume(sandbox).await?;
        }
        Section::Fork => {
            let forks = client.fork(sandbox, &ForkSandbox::default()).await?;
            let elapsed = began.elapsed();
            for fork in forks.sandboxes {
                client.destroy(&fork.id).await?;
            }
            return Ok(elapsed);
        }
    }
    Ok(began.elapsed())
}

async fn exec(client: &Client, sandbox: &str) -> Result<(), ClientError> {
    let cmd = vec!["true".to_owned()];
    client.exec(sandbox, &ExecRequest { cmd, ..ExecRequest::default() }).await.map(drop)
}

/// Percentiles by nearest rank.
fn summary(what: &'static str, mut times: Vec<Duration>) -> Figures {
    times.sort_unstable();
    let rank = |percent: usize| {
        let index = (times.len() * percent).div_ceil(100).max(1) - 1;
        times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
    };
    Figures {
        what,
        samples: times.len(),
        p50_ms: rank(50),
        p95_ms: rank(95),
        p99_ms: (times.len() >= P99_SAMPLES).then(|| rank(99)),
        max_ms: rank(100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank_and_not_of_too_few() {
        let ms = |count: u64| (1..=count).rev().map(Duration::from_millis).collect::<Vec<_>>();
        let few = summary("x", ms(20));
        assert_eq!((few.p50_ms, few.p95_ms, few.p99_ms, few.max_ms), (10.0, 19.0, None, 20.0));
        assert_eq!(summary("x", ms(100)).p99_ms, Some(99.0));
    }
}
