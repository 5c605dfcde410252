//! Rebuilds the disk at many points, lets a daemon recover on each, and counts the faults.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tokio::time::Instant;

use super::disk::{self, Export, FileSystem};
use super::expected::Expected;
use super::log::{self, Entry};
use super::recovered::Seen;
use super::scenario::Recorded;
use super::{Options, inside, text};

/// How many disks are checked at once, each with its own files.
const WORKERS: usize = 2;

/// How many faults are printed; all of them are in `points.jsonl`.
const SHOWN: usize = 20;

/// A moment of the recording at which the power is cut.
#[derive(Clone, Copy, Debug)]
struct Point {
    /// The entry of the flush before the cut: the writes before it are on the disk.
    flush: usize,
    /// The entry of the next flush: parts of the writes before it may be on the disk.
    until: usize,
    /// Whether parts of those writes are on the disk.
    torn: bool,
    /// Whether the sandboxes are started.
    start: bool,
}

/// The outcome at one point, a line of `points.jsonl`.
#[derive(Debug, Serialize)]
struct Outcome {
    flush: usize,
    until: usize,
    torn: bool,
    seconds: f64,
    faults: Vec<String>,
    seen: Seen,
}

/// State that the workers share.
struct Shared<'run> {
    file_system: FileSystem,
    work: &'run Path,
    options: &'run Options,
    entries: &'run [Entry],
    calls: &'run [Recorded],
    /// Starts that need not be tried again, by the state of the sandbox's files.
    tried: Mutex<BTreeMap<String, (String, String)>>,
    outcomes: Mutex<(File, Summary)>,
}

/// The printed summary.
#[derive(Debug, Default)]
struct Summary {
    points: usize,
    started: usize,
    faults: Vec<(usize, String)>,
}

/// Checks as many points as the options say, those right after a response first. Returns the number
/// of faults.
pub(super) fn check(file_system: FileSystem, work: &Path, options: &Options) -> Result<usize> {
    let began = Instant::now();
    let end: u64 = fs::read_to_string(work.join("end"))?.parse()?;
    let entries = log::read(&work.join("log.img"), Some(end))?;
    let calls = fs::read_to_string(work.join("calls.jsonl"))?;
    let calls: Vec<Recorded> = calls.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    for call in &calls {
        ensure!(
            call.error.is_none(),
            "{}: the recorded call failed: {:?}",
            call.subject,
            call.error
        );
    }
    let points = choose(&entries, &calls, options)?;
    let shared = Shared {
        file_system,
        work,
        options,
        entries: &entries,
        calls: &calls,
        tried: Mutex::default(),
        outcomes: Mutex::new((File::create(work.join("points.jsonl"))?, Summary::default())),
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                // Both disks of a flush go to one worker, so that sandboxes with the same files are
                // started once.
                let flushes = points.chunks(2).skip(worker).step_by(WORKERS);
                let points: Vec<Point> = flushes.flatten().copied().collect();
                let shared = &shared;
                scope.spawn(move || shared.run(worker, &points))
            })
            .collect();
        workers.into_iter().try_for_each(|it| it.join().expect("a worker does not panic"))
    })?;
    let (_, summary) = shared.outcomes.into_inner().expect("no worker panicked");
    println!(
        "{}: {} points, {} of them torn, {} starts tried, in {:.0} s; {} faults",
        file_system.name(),
        summary.points,
        points.iter().filter(|point| point.torn).count(),
        summary.started,
        began.elapsed().as_secs_f64(),
        summary.faults.len()
    );
    for (flush, fault) in summary.faults.iter().take(SHOWN) {
        println!("  flush {flush}: {}", fault.lines().next().unwrap_or_default());
    }
    Ok(summary.faults.len())
}

/// Chooses points: first those right after a response, then others by the seed. Each flush is two
/// points, without and with torn writes.
fn choose(entries: &[Entry], calls: &[Recorded], options: &Options) -> Result<Vec<Point>> {
    let flushes: Vec<usize> =
        (0..entries.len()).filter(|index| entries[*index].is_flush()).collect();
    let first = calls.first().context("no call was recorded")?.after;
    let ends = flushes.iter().copied().skip(1).chain([entries.len()]);
    let pairs: Vec<(usize, usize)> =
        flushes.iter().copied().zip(ends).filter(|(_, until)| *until as u64 >= first).collect();
    let mut chance = fastrand::Rng::with_seed(options.seed);
    let (mut answered, mut rest): (Vec<_>, Vec<_>) =
        pairs.into_iter().partition(|(flush, until)| {
            calls.iter().any(|call| (*flush as u64) < call.after && call.after <= *until as u64)
        });
    chance.shuffle(&mut answered);
    chance.shuffle(&mut rest);
    let wanted = options.points.div_ceil(2);
    ensure!(
        answered.len() + rest.len() >= wanted,
        "the recording has {} flushes: too few for {} points",
        answered.len() + rest.len(),
        options.points
    );
    let chosen: BTreeSet<(usize, usize)> = answered.into_iter().chain(rest).take(wanted).collect();
    let count = chosen.len();
    let starts = options.starts.map_or(count, |starts| starts.div_ceil(2).min(count));
    let points = chosen.into_iter().enumerate().flat_map(|(index, (flush, until))| {
        // Points with starts are spread evenly over the recording.
        let start = (index + 1) * starts / count > index * starts / count;
        [false, true].map(|torn| Point { flush, until, torn, start })
    });
    Ok(points.collect())
}

impl Shared<'_> {
    /// Checks `points`, which are in order of time, with this worker's own files.
    fn run(&self, worker: usize, points: &[Point]) -> Result<()> {
        let files = Files::new(self, worker)?;
        let mut applied = 0;
        for point in points {
            while applied <= point.flush {
                log::apply(&files.log, &files.current, &self.entries[applied], None)?;
                applied += 1;
            }
            let began = Instant::now();
            let seen = files.recover(self, point)?;
            let expected = Expected::at(self.calls, point.until as u64);
            let faults = expected.faults(&seen);
            let new: Vec<_> = seen.tried.clone().into_iter().collect();
            let started = self.remember(new);
            let outcome = Outcome {
                flush: point.flush,
                until: point.until,
                torn: point.torn,
                seconds: began.elapsed().as_secs_f64(),
                faults,
                seen,
            };
            self.note(outcome, started)?;
        }
        Ok(())
    }

    /// Remembers the outcomes of starts. Returns how many are new.
    fn remember(&self, starts: Vec<(String, (String, String))>) -> usize {
        let mut tried = self.tried.lock().expect("no worker panicked");
        let before = tried.len();
        tried.extend(starts);
        tried.len() - before
    }

    fn note(&self, outcome: Outcome, started: usize) -> Result<()> {
        let mut outcomes = self.outcomes.lock().expect("no worker panicked");
        writeln!(outcomes.0, "{}", serde_json::to_string(&outcome)?)?;
        outcomes.1.points += 1;
        outcomes.1.started += started;
        outcomes.1.faults.extend(outcome.faults.into_iter().map(|fault| (outcome.flush, fault)));
        Ok(())
    }
}

/// The files of one worker.
struct Files {
    work: PathBuf,
    log: File,
    /// The disk as of the checked flush.
    current: File,
}

impl Files {
    fn new(shared: &Shared<'_>, worker: usize) -> Result<Self> {
        let work = shared.work.join(format!("worker-{worker}"));
        fs::create_dir(&work)?;
        disk::copy(&shared.work.join("base.img"), &work.join("current.img"))?;
        let mut keys: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for call in shared.calls {
            if let (Some(user), Some(key)) = (call.subject.strip_prefix("user:"), &call.key) {
                keys.entry(user).or_default().push(key);
            }
        }
        fs::write(work.join("keys.json"), serde_json::to_vec(&keys)?)?;
        let current = OpenOptions::new().read(true).write(true).open(work.join("current.img"))?;
        Ok(Self { log: File::open(shared.work.join("log.img"))?, current, work })
    }

    /// Rebuilds the disk as of a point and lets a daemon recover on it.
    fn recover(&self, shared: &Shared<'_>, point: &Point) -> Result<Seen> {
        let (disk, overlay, found) =
            (self.work.join("point"), self.work.join("over.qcow2"), self.work.join("seen.json"));
        let tried = serde_json::to_vec(&*shared.tried.lock().expect("no worker panicked"))?;
        fs::write(self.work.join("tried.json"), tried)?;
        let export = Export::overlay(&disk, &self.work.join("current.img"), &overlay)?;
        if point.torn {
            let piece = shared.file_system.whole_piece();
            let mut chance = fastrand::Rng::with_seed(shared.options.seed ^ point.flush as u64);
            let target = OpenOptions::new().read(true).write(true).open(&disk)?;
            for entry in &shared.entries[point.flush + 1..point.until] {
                log::apply(&self.log, &target, entry, Some(&entry.torn(piece, &mut chance)))?;
            }
        }
        let start = if point.start { "start" } else { "look" };
        inside(&["recover", &text(&self.work), start])?;
        export.wait_for_release()?;
        let mut seen: Seen = serde_json::from_slice(&fs::read(&found)?)?;
        if seen.unusable.is_none() && !shared.file_system.is_sound(&disk)? {
            seen.unusable = Some("the file system is damaged".into());
        }
        export.close()?;
        fs::remove_file(found)?;
        fs::remove_file(overlay)?;
        Ok(seen)
    }
}
