//! The power-loss test: `cargo xtask power-loss`.
//!
//! The daemon's data directory lies on a loop mount over QEMU's `blklogwrites`, which logs every
//! write and every flush of that disk. The test then rebuilds the disk as a power cut could have
//! left it, once for each of many flushes: with every write up to the flush, and with an arbitrary
//! part of the writes after it. A daemon recovers from each rebuilt disk. The test compares its
//! state with the responses that the recorded daemon had given before.
//!
//! ```text
//!  prepare   mkfs, images, a base snapshot            WORK/base.img
//!  record    the scenario, on the logged disk         WORK/log.img, WORK/calls.jsonl
//!  check     for each point: rebuild, recover, start  WORK/points.jsonl, a summary
//! ```
//!
//! The daemon runs in network, PID and mount namespaces of its own. The end of the PID namespace is
//! the power cut: it ends the daemon and its VMMs at once, and nothing stays on the host.
//!
//! A cut just before the *next* flush may lose everything that the disk's cache holds. So the
//! rebuilt disk must have everything that was acknowledged before that flush was done. The effects
//! of an operation in progress at that moment may be missing.

#![expect(clippy::disallowed_methods, reason = "programs run synchronously, outside any runtime")]

mod check;
mod daemon;
mod disk;
mod expected;
mod log;
mod recovered;
mod scenario;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use tokio::time::Instant;

use disk::FileSystem;

/// The disk's size. Its file is sparse and takes less than 1 GB.
const DISK_BYTES: u64 = 6 << 30;
/// The daemon's address, in its own network namespace.
const LISTEN: &str = "127.0.0.1:18080";

pub(super) const USAGE: &str = "cargo xtask power-loss [--file-system ext4|xfs]... [--points N] [--starts N] [--seed N] [--dump]";

/// The options of a run.
#[derive(Clone, Debug)]
struct Options {
    file_systems: Vec<FileSystem>,
    /// The least number of rebuilt disks to check on each file system.
    points: usize,
    seed: u64,
    /// The number of disks on which sandboxes are started, too; all of them if absent.
    starts: Option<usize>,
    /// Print the disk's log of the last run instead.
    dump: bool,
}

/// Runs `cargo xtask power-loss`, or the part of it that runs in namespaces of its own.
pub(super) fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["inside", "prepare", work] => return daemon::prepare(Path::new(work)),
        ["inside", "record", work, seed] => {
            return scenario::record(Path::new(work), seed.parse()?);
        }
        ["inside", "recover", work, start] => {
            return recovered::look(Path::new(work), start == "start");
        }
        _ => {}
    }
    let options = parse(arguments)?;
    if options.dump {
        return dump(&options);
    }
    if let Some(why) = obstacle() {
        bhatti_testkit::skip("the power-loss test", &why);
        println!("SKIPPED: the power-loss test, because {why}");
        return Ok(());
    }
    println!("seed: {}", options.seed);
    let mut faults = 0;
    for file_system in &options.file_systems {
        let work = work_directory(*file_system)?;
        faults += run_on(*file_system, &work, &options)?;
    }
    ensure!(faults == 0, "{faults} faults after power cuts; see points.jsonl");
    Ok(())
}

fn parse(arguments: &[String]) -> Result<Options> {
    let clock = std::time::SystemTime::UNIX_EPOCH.elapsed()?;
    let mut options = Options {
        file_systems: Vec::new(),
        points: 300,
        seed: u64::from(clock.subsec_nanos()),
        starts: None,
        dump: false,
    };
    let mut rest = arguments.iter();
    while let Some(option) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{option} needs a value"));
        match option.as_str() {
            "--file-system" => options.file_systems.push(value()?.parse()?),
            "--points" => options.points = value()?.parse().context("--points")?,
            "--seed" => options.seed = value()?.parse().context("--seed")?,
            "--starts" => options.starts = Some(value()?.parse().context("--starts")?),
            "--dump" => options.dump = true,
            _ => bail!("unknown option {option}; usage: {USAGE}"),
        }
    }
    if options.file_systems.is_empty() {
        options.file_systems.push(FileSystem::Ext4);
    }
    Ok(options)
}

/// Returns why the test cannot run here, if it cannot.
fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("mounting file systems needs root".into());
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if fs::File::open(device).is_err() {
            return Some(format!("{device} cannot be opened"));
        }
    }
    let driver = Command::new("qemu-storage-daemon").arg("--help").output();
    if !driver.is_ok_and(|it| String::from_utf8_lossy(&it.stdout).contains("fuse")) {
        return Some("qemu-storage-daemon with FUSE exports is not installed".into());
    }
    None
}

/// Makes an empty directory for this run's files. Unmounts the exports of an interrupted run first.
fn work_directory(file_system: FileSystem) -> Result<PathBuf> {
    let work = bhatti_testkit::repository()
        .canonicalize()?
        .join("target/power-loss")
        .join(file_system.name());
    if work.exists() {
        disk::unmount_left_overs(&work)?;
        fs::remove_dir_all(&work).with_context(|| work.display().to_string())?;
    }
    fs::create_dir_all(&work)?;
    Ok(work)
}

/// Prepares, records and checks on one file system. Returns the number of faults.
fn run_on(file_system: FileSystem, work: &Path, options: &Options) -> Result<usize> {
    let began = Instant::now();
    let base = work.join("base.img");
    disk::make(file_system, &base, DISK_BYTES)?;
    inside(&["prepare", &text(work)])?;
    let prepared = began.elapsed();
    let entries = record(work, options.seed)?;
    let recorded = began.elapsed();
    println!(
        "{}: {entries} entries logged; prepared in {:.0} s, recorded in {:.0} s",
        file_system.name(),
        prepared.as_secs_f64(),
        (recorded - prepared).as_secs_f64()
    );
    check::check(file_system, work, options)
}

/// Runs the scenario on a logged copy of the prepared disk. Returns the number of log entries.
fn record(work: &Path, seed: u64) -> Result<u64> {
    let recorded = work.join("recorded.img");
    disk::copy(&work.join("base.img"), &recorded)?;
    let log = work.join("log.img");
    fs::File::create_new(&log)?.set_len(64 << 30)?;
    let export = disk::Export::logged(&work.join("disk"), &recorded, &log)?;
    let outcome = inside(&["record", &text(work), &seed.to_string()]);
    export.close()?;
    fs::remove_file(&recorded)?;
    outcome?;
    Ok(fs::read_to_string(work.join("end"))?.parse()?)
}

fn dump(options: &Options) -> Result<()> {
    for file_system in &options.file_systems {
        let log = bhatti_testkit::repository()
            .join("target/power-loss")
            .join(file_system.name())
            .join("log.img");
        for (index, entry) in log::read(&log, None)?.iter().enumerate() {
            println!("{index} {entry:?}");
        }
    }
    Ok(())
}

/// Runs a part of this program in its own namespaces. When the part ends, its mounts and processes
/// end with the namespaces.
fn inside(arguments: &[&str]) -> Result<()> {
    let status = Command::new("unshare")
        .args(["-n", "-p", "-m", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe()?)
        .args(["power-loss", "inside"])
        .args(arguments)
        .stdin(Stdio::null())
        .status()
        .context("unshare")?;
    ensure!(status.success(), "power-loss inside {}: {status}", arguments.join(" "));
    Ok(())
}

/// Runs a program to its end. The error has the program's standard error.
fn run_program(program: &str, arguments: &[&str]) -> Result<()> {
    let ran = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| program.to_owned())?;
    let error = String::from_utf8_lossy(&ran.stderr);
    ensure!(ran.status.success(), "{program} {}: {}: {error}", arguments.join(" "), ran.status);
    Ok(())
}

/// Waits until `holds` returns true, for at most `limit`. Returns whether it did.
fn wait_until(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if holds() {
            return true;
        }
        if began.elapsed() > limit {
            return false;
        }
        thread::park_timeout(Duration::from_millis(10));
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
