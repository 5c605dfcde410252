//! Counts of instructions, by valgrind's callgrind. They show a change of one percent, which no
//! clock does.
//!
//! Each operation runs a few times and many times. The difference is its cost without the startup.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use bhatti_proto::{FrameReader, FrameType, FrameWriter};
use bhatti_testkit::repository;
use lohar::ring::Ring;
use tokio::process::Command;

use super::requests::{self, Daemons};

/// The few and the many runs of each operation. A list is as much work as hundreds of the others.
const TIMES: [u64; 2] = [100, 600];
const LISTS: [u64; 2] = [5, 25];

/// How far a count may exceed the recorded one, in percent: the C library chooses different code on
/// different CPUs.
const TOLERANCE_PERCENT: u64 = 5;

/// The file with the recorded counts.
const NOTED: &str = "docs/instructions.json";

const FRAMES: &str = "8 KiB framed and read";
const RING: &str = "4 KiB into the scrollback";
const REQUEST: &str = "one sandbox asked for";
const FIRST_LIST: &str = "a thousand sandboxes listed";
const LIST: &str = "a thousand sandboxes listed again";

/// Counts, and compares with the recorded counts; with `record`, records the counts first. Returns
/// how many counts are too high.
pub(super) async fn check(record: bool) -> Result<usize> {
    if bhatti_host::process::command("valgrind").arg("--version").output().await.is_err() {
        println!("SKIPPED: counts of instructions, because valgrind is not installed");
        return Ok(0);
    }
    let mut counts = BTreeMap::new();
    for what in [FRAMES, RING, REQUEST, FIRST_LIST, LIST] {
        let times = if [FIRST_LIST, LIST].contains(&what) { LISTS } else { TIMES };
        counts.insert(what, of_work(what, times).await?);
    }
    let path = repository().join(NOTED);
    if record {
        fs::write(&path, serde_json::to_string_pretty(&counts)? + "\n")?;
    }
    let noted: BTreeMap<String, u64> = serde_json::from_slice(&fs::read(&path)?)?;
    println!("{:48} {:>12} {:>12}", "instructions", "recorded", "counted");
    let mut broken = 0;
    for (what, count) in counts {
        let noted = *noted.get(what).with_context(|| format!("{NOTED} has no `{what}`"))?;
        let verdict = if count * 100 > noted * (100 + TOLERANCE_PERCENT) {
            broken += 1;
            "BROKEN"
        } else if count * (100 + TOLERANCE_PERCENT) < noted * 100 {
            "fewer: record it with `cargo xtask bench check --record`"
        } else {
            "holds"
        };
        println!("{what:48} {noted:>12} {count:>12} {verdict}");
    }
    Ok(broken)
}

/// Runs the operation `what` `times` times. A process under callgrind calls this.
pub(crate) fn work(what: &str, times: u64) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match what {
        FRAMES => runtime.block_on(frame(times)),
        RING => {
            let mut ring = Ring::default();
            (0..times).for_each(|_| ring.write(&[7; 4 << 10]));
            Ok(())
        }
        REQUEST => runtime.block_on(requests::ask("/sandboxes/stopped-7", 10, times, Daemons::One)),
        FIRST_LIST => runtime.block_on(requests::ask("/sandboxes", 1000, times, Daemons::New)),
        LIST => runtime.block_on(requests::ask("/sandboxes", 1000, times, Daemons::One)),
        other => bail!("unknown operation `{other}`"),
    }
}

async fn frame(times: u64) -> Result<()> {
    let payload = vec![7; 8 << 10];
    for _ in 0..times {
        let mut writer = FrameWriter::new(Vec::with_capacity(payload.len() + 64));
        writer.send(FrameType::STDOUT, &payload).await?;
        let frame = FrameReader::new(&writer.get_mut()[..]).next().await?;
        ensure!(frame.is_some_and(|frame| frame.payload == payload), "read another frame");
    }
    Ok(())
}

async fn of_work(what: &str, often: [u64; 2]) -> Result<u64> {
    let mut totals = [0; 2];
    for (total, times) in totals.iter_mut().zip(often) {
        let place = tempfile::tempdir()?;
        let (mut command, counted) = under_callgrind(place.path(), &std::env::current_exe()?);
        command.args(["bench", "work", what, &times.to_string()]);
        ensure!(command.status().await?.success(), "`{what}` failed under callgrind");
        *total = read_total(&counted)?;
    }
    Ok((totals[1] - totals[0]) / (often[1] - often[0]))
}

/// Returns a command that runs `program` under callgrind, and the file for the counts.
fn under_callgrind(place: &Path, program: &Path) -> (Command, PathBuf) {
    let counted = place.join("counted");
    let mut command = bhatti_host::process::command("valgrind");
    command.args(["--tool=callgrind", "--quiet"]);
    command.arg(format!("--callgrind-out-file={}", counted.display()));
    command.arg(program).stdout(Stdio::null()).stderr(Stdio::null());
    (command, counted)
}

fn read_total(counted: &Path) -> Result<u64> {
    let text = fs::read_to_string(counted)?;
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("totals: ").or_else(|| line.strip_prefix("summary: ")));
    Ok(total.context("callgrind wrote no total")?.trim().parse()?)
}
