//! The figures of a benchmark.

use std::fmt;
use std::fs;
use std::time::Duration;

use serde::Serialize;

use crate::error::CliError;
use crate::output::{Cell, Table};

/// Minimum number of samples for a meaningful 99th percentile.
const P99_SAMPLES: usize = 100;

/// The times of one section, and their percentiles.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    pub(super) what: &'static str,
    samples: usize,
    p50_ms: f64,
    p95_ms: f64,
    /// Absent if there are too few samples.
    p99_ms: Option<f64>,
    max_ms: f64,
    /// All times, the shortest first.
    pub(super) times_ms: Vec<f64>,
}

pub(super) const FIGURES: Table<Figures> = Table {
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

impl Figures {
    /// Computes percentiles by nearest rank.
    pub(super) fn of(what: &'static str, mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let times_ms: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1000.0).collect();
        let rank = |percent: usize| {
            let index = (times_ms.len() * percent).div_ceil(100).max(1) - 1;
            times_ms.get(index).copied().unwrap_or_default()
        };
        Self {
            what,
            samples: times_ms.len(),
            p50_ms: rank(50),
            p95_ms: rank(95),
            p99_ms: (times_ms.len() >= P99_SAMPLES).then(|| rank(99)),
            max_ms: rank(100),
            times_ms,
        }
    }
}

/// A machine.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    processor: String,
    cpus: usize,
    memory_mib: u64,
    kernel: String,
}

impl Machine {
    /// Returns the machine that this process runs on.
    pub(super) fn this() -> Result<Self, CliError> {
        let processor = fs::read_to_string("/proc/cpuinfo")?;
        let name = processor.lines().find_map(|line| line.strip_prefix("model name"));
        let name = name.and_then(|rest| rest.split_once(':')).map(|(_, name)| name.trim());
        Ok(Self {
            processor: name.unwrap_or(std::env::consts::ARCH).to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            memory_mib: bhatti_host::memory::machine_bytes()? >> 20,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, cpus, memory_mib, kernel } = self;
        write!(f, "{cpus} × {processor}, {} GiB, Linux {kernel}", (memory_mib + 512) >> 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_use_the_nearest_rank_and_p99_needs_enough_samples() {
        let ms = |count: u64| (1..=count).rev().map(Duration::from_millis).collect::<Vec<_>>();
        let few = Figures::of("x", ms(20));
        assert_eq!((few.p50_ms, few.p95_ms, few.p99_ms, few.max_ms), (10.0, 19.0, None, 20.0));
        assert_eq!(Figures::of("x", ms(100)).p99_ms, Some(99.0));
    }
}
