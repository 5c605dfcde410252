//! Measures and prints the figures that the project promises.

mod api;
mod base;
mod check;
mod files;
mod forks;

pub(crate) use check::counts::work;
pub(crate) use forks::{VM_PRACTISES, bare_fork};

use std::fs;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bhatti_agent::{AgentClient, UnixChannel};
use bhatti_api::CreateSandbox;
use bhatti_client::{Client, CommandEvent};
use bhatti_proto::ExecRequest;
use bhatti_testkit::{TestDaemon, dist};
use tokio::time::Instant;

/// Samples of each figure. A p99 needs a hundred.
const ROUNDS: usize = 100;
const CREATES: usize = 10;
const AGENT_ROUNDS: usize = 500;

/// Measures and prints everything, or only the section `only`.
pub(crate) fn run(only: Option<&str>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        println!("{:44} {:>4} {:>10} {:>10} {:>10} {:>10}", "", "n", "p50", "p95", "p99", "max");
        if only.is_none() {
            measure().await?;
        }
        if only.is_none_or(|only| only == "api") {
            api::measure().await?;
        }
        if only.is_none_or(|only| only == "files") {
            files::measure().await?;
        }
        if only.is_none_or(|only| only == "forks") {
            forks::measure().await?;
        }
        Ok(())
    })
}

/// Measures this tree beside another revision.
pub(crate) fn beside(revision: Option<&str>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(base::measure(revision))
}

/// Checks the promised figures. With `record`, writes the counts of instructions first.
pub(crate) fn check(record: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(check::check(record))
}

async fn measure() -> Result<()> {
    show("serve: process start to /health answering", startup().await?);
    let daemon = TestDaemon::start().await;
    println!("{:44} {:>26.1} MiB", "idle daemon, resident", resident_mib(daemon.pid())?);
    drop(daemon);
    agent().await?;
    let daemon = TestDaemon::start().await;
    let size = fs::metadata(dist("lohar"))?.len();
    println!("{:44} {:>26.2} MiB", "lohar on disk", mib(size));

    let request = CreateSandbox { cold_boot: true, ..bhatti_testkit::named("bench") };
    let mut creates = Vec::new();
    for _ in 0..CREATES {
        let began = Instant::now();
        daemon.client.create(&request).await?;
        exec(&daemon.client, &["true"]).await?;
        creates.push(began.elapsed());
        daemon.client.destroy("bench").await?;
    }
    show("create by cold boot, and the first exec", creates);

    daemon.client.create(&request).await?;
    let mut execs = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        exec(&daemon.client, &["true"]).await?;
        execs.push(began.elapsed());
    }
    show("exec `true`, a new connection each", execs);
    daemon.client.destroy("bench").await?;
    Ok(())
}

/// Compares a command through the agent in test mode with a bare process.
async fn agent() -> Result<()> {
    let (mut through_agent, mut bare) = agent_and_bare().await?;
    let ratio = median(&mut through_agent).as_secs_f64() / median(&mut bare).as_secs_f64();
    show("`true`: fork, exec and wait", bare);
    show("`true` through the agent in test mode", through_agent);
    println!("{:44} {ratio:>26.2} ×", "  of the bare cost, by p50");
    Ok(())
}

/// Measures `true` through the agent in test mode and as a bare process, in turns.
async fn agent_and_bare() -> Result<(Vec<Duration>, Vec<Duration>)> {
    let directory = tempfile::tempdir()?;
    let channel = UnixChannel {
        control: directory.path().join("control"),
        forward: directory.path().join("forward"),
    };
    let mut command = bhatti_host::process::command(dist("lohar"));
    command
        .env("LOHAR_TEST", "1")
        .env("LOHAR_SOCK", &channel.control)
        .env("LOHAR_FWD_SOCK", &channel.forward);
    let process = command.stderr(Stdio::null()).spawn()?;
    let client = AgentClient::new(Arc::new(channel));
    client.wait_ready(Duration::from_secs(10)).await?;
    println!(
        "{:44} {:>26.2} MiB",
        "lohar, idle, resident",
        resident_mib(process.id().context("lohar has ended")?)?
    );
    let (mut through_agent, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..AGENT_ROUNDS {
        let began = Instant::now();
        #[expect(clippy::disallowed_methods, reason = "measures the cost of a bare process")]
        let status = std::process::Command::new("/usr/bin/true").status()?;
        bare.push(began.elapsed());
        ensure!(status.success(), "true failed");
        let request = ExecRequest { argv: vec!["true".to_owned()], ..ExecRequest::default() };
        let began = Instant::now();
        let (code, ..) = client.run(request).await?;
        through_agent.push(began.elapsed());
        ensure!(code == 0, "true failed");
    }
    Ok((through_agent, bare))
}

pub(crate) fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

async fn startup() -> Result<Vec<Duration>> {
    let data = tempfile::tempdir()?;
    let client = Client::unix(data.path());
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let mut command = bhatti_host::process::command(dist("bhatti"));
        command.arg("serve").arg("--data-dir").arg(data.path()).stderr(Stdio::null());
        let mut daemon = command.spawn()?;
        while client.health().await.is_err() {
            ensure!(began.elapsed() < Duration::from_secs(10), "the daemon did not start");
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        times.push(began.elapsed());
        daemon.kill().await?;
    }
    Ok(times)
}

async fn exec(client: &Client, command: &[&str]) -> Result<()> {
    let start = bhatti_testkit::start(command);
    let (_input, mut output) = client.start_command("bench", &start).await?;
    let event = output.next().await?;
    ensure!(event == CommandEvent::Exit(0), "the command sent {event:?}");
    Ok(())
}

/// Prints a row of nearest-rank percentiles.
pub(crate) fn show(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let rank = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
    let ms = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
    let p99 = if times.len() >= ROUNDS { ms(rank(99)) } else { "-".to_owned() };
    let (p50, p95, max) = (ms(rank(50)), ms(rank(95)), ms(rank(100)));
    println!("{what:44} {:>4} {p50:>10} {p95:>10} {p99:>10} {max:>10}", times.len());
}

fn resident_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(mib(kib << 10))
}

#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^52 bytes")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
