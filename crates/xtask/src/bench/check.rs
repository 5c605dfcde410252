//! Checks the promises: ratios of operations that are measured in turns on one machine, so that a
//! slow machine breaks none, each with its confidence interval; and counts of instructions, where
//! time is too noisy.

pub(super) mod counts;
mod requests;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bhatti_client::Client;
use bhatti_engine::MemoryKind;
use bhatti_qemu::{PROGRAM, Qemu};
use bhatti_testkit::{Serve, TestDaemon, named, wait_for};
use tokio::time::Instant;

use super::{api, exec, forks, median};

/// Samples of each side of a ratio.
const ROUNDS: usize = 60;
const CREATES: usize = 20;
const SNAPSHOTS: usize = 7;

/// Bootstrap resamples for the interval of a ratio.
const DRAWS: usize = 2000;

/// Samples of two operations that were measured in turns, and the limit of their ratio.
struct Promise {
    what: &'static str,
    over: &'static str,
    bar: f64,
    times: Vec<Duration>,
    base: Vec<Duration>,
}

/// A ratio of medians, and its 95 % bootstrap interval.
pub(super) struct Ratio {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// Checks all promises. With `record`, writes the counts of instructions before it compares them.
pub(super) async fn check(record: bool) -> Result<()> {
    let mut broken = counts::check(record).await?;
    println!("{:48} {:>6} {:>6} {:>15}", "", "bar", "ratio", "95 % interval");
    for promise in measure().await? {
        broken += usize::from(!promise.holds());
    }
    match broken {
        0 => Ok(()),
        broken => bail!("{broken} promises are broken"),
    }
}

async fn measure() -> Result<Vec<Promise>> {
    let (through_agent, bare) = super::agent_and_bare().await?;
    let mut promises = vec![Promise {
        what: "`true` through the agent",
        over: "of fork, exec and wait",
        bar: 1.5,
        times: through_agent,
        base: bare,
    }];
    let config = "network: off\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let origin = daemon.client.create(&named("bench")).await?.origin;
    let template = origin.strip_prefix("template ").context("not forked from a base snapshot")?;
    let template = daemon.data_dir().join("templates").join(template).canonicalize()?;
    promises.push(creation(&daemon, &template).await?);
    promises.push(waking(&daemon.client).await?);
    promises.push(http().await?);
    promises.push(diff(&mut daemon).await?);
    daemon.client.destroy("bench").await?;
    Ok(promises)
}

/// Measures a create with default options, without a network, against the engine alone.
async fn creation(daemon: &TestDaemon, template: &std::path::Path) -> Result<Promise> {
    let engine = Qemu::engine(PROGRAM.into());
    let place = tempfile::tempdir()?;
    let (mut times, mut base) = (Vec::new(), Vec::new());
    for _ in 0..CREATES {
        // The VM of the sandbox `bench`, and a spare.
        wait_for("the spare VM", || daemon.all_vmm_pids().len() == 2).await;
        tokio::time::sleep(forks::VM_PRACTISES).await;
        let began = Instant::now();
        let new = daemon.client.create(&named("new")).await?;
        let ran = bhatti_testkit::run(&daemon.client, &new.id, &["true"]).await?;
        ensure!(ran.code == 0, "true failed");
        times.push(began.elapsed());
        daemon.client.destroy("new").await?;
        base.push(forks::bare_fork(&engine, template, place.path(), None).await?);
    }
    let (what, over) = ("create and first exec, as by default", "of a bare fork");
    Ok(Promise { what, over, bar: 0.8, times, base })
}

async fn waking(client: &Client) -> Result<Promise> {
    let (mut times, mut base) = (Vec::new(), Vec::new());
    exec(client, &["true"]).await?;
    for _ in 0..ROUNDS {
        let began = Instant::now();
        exec(client, &["true"]).await?;
        base.push(began.elapsed());
        client.pause("bench").await?;
        let began = Instant::now();
        exec(client, &["true"]).await?;
        times.push(began.elapsed());
    }
    let (what, over) = ("exec in a paused sandbox", "of exec in a hot one");
    Ok(Promise { what, over, bar: 1.35, times, base })
}

async fn http() -> Result<Promise> {
    // A spare that starts during the measurement would take CPU time.
    let config = "network: off\nready_vmms: 0\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    daemon.client.create(&named("bench")).await?;
    let (times, base) = api::exec_pairs(&mut daemon, ROUNDS).await?;
    let (what, over) = ("exec over HTTP", "of the same on the channel");
    Ok(Promise { what, over, bar: 1.3, times, base })
}

async fn diff(daemon: &mut TestDaemon) -> Result<Promise> {
    daemon.client.pause("bench").await?;
    let directory: PathBuf = daemon.sandbox_directories().remove(0);
    let place = directory.with_extension("bench");
    let (mut times, mut base) = (Vec::new(), Vec::new());
    // QEMU's monitor serves one client at a time.
    daemon.terminate().await;
    let vm = forks::adopt(&directory).await?;
    for _ in 0..SNAPSHOTS {
        forks::snapshot(vm.as_ref(), &place, MemoryKind::Diff, &mut times).await?;
        forks::snapshot(vm.as_ref(), &place, MemoryKind::Full, &mut base).await?;
    }
    drop(vm);
    daemon.serve().await;
    let (what, over) = ("diff snapshot of an idle sandbox", "of a full one");
    Ok(Promise { what, over, bar: 0.15, times, base })
}

impl Promise {
    /// Prints the promise. Returns whether it holds: it is broken if its whole interval is beyond
    /// the bar.
    fn holds(&self) -> bool {
        let Ratio { value, low, high } = ratio(&self.times, &self.base);
        let holds = low <= self.bar;
        let verdict = match (holds, value <= self.bar) {
            (true, true) => "holds",
            (true, false) => "holds within the noise",
            (false, _) => "BROKEN",
        };
        let what = format!("{} {}", self.what, self.over);
        println!(
            "{what:48.60} {:>6.2} {value:>6.2} {low:>7.2}–{high:<7.2} {verdict} (n = {})",
            self.bar,
            self.times.len()
        );
        holds
    }
}

/// Returns the ratio of the medians, and its interval by resampling.
pub(super) fn ratio(times: &[Duration], base: &[Duration]) -> Ratio {
    let of = |times: &mut [Duration], base: &mut [Duration]| {
        median(times).as_secs_f64() / median(base).as_secs_f64()
    };
    // The draws are always the same, so that the same samples have the same interval.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = |from: &[Duration]| -> Vec<Duration> {
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap_or_default()
        };
        from.iter().map(|_| from[next() % from.len()]).collect()
    };
    let mut drawn: Vec<f64> = (0..DRAWS).map(|_| of(&mut draw(times), &mut draw(base))).collect();
    drawn.sort_by(f64::total_cmp);
    Ratio {
        value: of(&mut times.to_vec(), &mut base.to_vec()),
        low: drawn[DRAWS * 25 / 1000],
        high: drawn[DRAWS * 975 / 1000],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promise_is_broken_only_if_its_whole_interval_exceeds_the_bar() {
        let ms = |from: u64, to: u64| (from..to).map(Duration::from_millis).collect::<Vec<_>>();
        let Ratio { value, low, high } = ratio(&ms(90, 130), &ms(40, 60));
        assert!(low <= value && value <= high && low > 1.5 && high < 3.0, "{low} {value} {high}");
        let promise =
            |bar| Promise { what: "x", over: "of y", bar, times: ms(90, 130), base: ms(40, 60) };
        assert!(promise(low + 0.01).holds() && promise(3.0).holds());
        assert!(!promise(low - 0.01).holds());
    }
}
