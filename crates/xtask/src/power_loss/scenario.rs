//! The operations of the recorded daemon, and the promise of each response.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::Instant;

use super::daemon::Daemon;
use super::{log, run_program, text};

/// One step of the scenario.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// One call of the command line.
    Call(Promise, &'static str),
    /// As `Call`, with input.
    CallWith(Promise, &'static str, &'static str),
    /// As `Call`, while another program of the host calls syncfs(2) 1.5 s after the call began.
    CallDuringSync(Promise, &'static str),
    /// The guest of a sandbox overwrites the content of `~/f` in place, with fdatasync.
    Write(&'static str, &'static str),
    /// The kernel writes everything back, as it otherwise does within half a minute.
    Settle,
    /// A short or a long pause. ext4 commits its journal every five seconds.
    Pause,
}

/// The promise of a response about its subject, `KIND:NAME`.
#[derive(Clone, Copy, Debug)]
enum Promise {
    /// The subject exists with this state.
    Is(&'static str, &'static str),
    /// The subject exists, and the key in the response is the only one that is accepted.
    Key(&'static str),
    /// The subject exists, with the time of change in the response.
    Changed(&'static str),
    /// The subject does not exist.
    Gone(&'static str),
}

const THERE: &str = "there";
const RUNNING: &str = "running";

/// Creates, changes and deletes each kind of resource, with or without a pause after each step.
const SCENARIO: &[Step] = {
    use Promise::{Changed, Gone, Is, Key};
    use Step::{Call, CallDuringSync, CallWith, Pause, Settle, Write};
    &[
        Call(Key("user:u1"), "user create u1"),
        CallWith(Changed("secret:S1"), "secret set S1", "one"),
        Call(Is("volume:v1", THERE), "volume create v1 --size 64"),
        Call(Is("sandbox:a", RUNNING), "create --name a"),
        Write("a", "1"),
        Call(Is("snapshot:s0", THERE), "snapshot create a s0"),
        Call(Is("sandbox:d", RUNNING), "create --name d"),
        Write("d", "1"),
        Pause,
        Settle,
        Call(Key("user:u1"), "user rotate-key u1"),
        CallWith(Changed("secret:S1"), "secret set S1", "two"),
        Call(Key("user:u2"), "user create u2"),
        Settle,
        Call(Gone("user:u2"), "user delete u2"),
        Call(Is("volume:v2", THERE), "volume create v2 --size 64"),
        Pause,
        Settle,
        Call(Is("snapshot:s1", THERE), "snapshot create a s1"),
        Pause,
        Write("a", "2"),
        Settle,
        Call(Is("sandbox:b", RUNNING), "fork a --name b"),
        Pause,
        Write("b", "2"),
        Settle,
        Call(Gone("snapshot:s0"), "snapshot delete s0"),
        Pause,
        Settle,
        Write("a", "8"),
        Write("a", "9"),
        Settle,
        Call(Is("sandbox:a", "stopped"), "stop a"),
        Pause,
        Settle,
        Call(Is("sandbox:a", RUNNING), "start a"),
        Write("a", "3"),
        Write("a", "6"),
        Write("a", "7"),
        Pause,
        Settle,
        Call(Gone("volume:v1"), "volume delete v1"),
        Pause,
        Call(Gone("sandbox:b"), "destroy --yes b"),
        Pause,
        Settle,
        CallDuringSync(Is("sandbox:c", RUNNING), "create --name c --cold-boot"),
        Write("c", "4"),
        Pause,
        Settle,
        Call(Is("sandbox:e", RUNNING), "snapshot resume s1 --name e"),
        Write("e", "5"),
        Call(Is("sandbox:d", "stopped"), "stop d"),
        Pause,
        Call(Is("snapshot:s2", THERE), "snapshot create c s2"),
        Call(Is("sandbox:f", RUNNING), "fork c --name f"),
        Pause,
    ]
};

/// A recorded call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Recorded {
    /// `KIND:NAME`.
    pub(super) subject: String,
    /// The subject's state after the call; `None` if the subject is gone.
    pub(super) state: Option<String>,
    /// The id of the subject, if the response has one.
    pub(super) id: Option<String>,
    /// The API key in the response, if any.
    pub(super) key: Option<String>,
    /// Entries of the log before the call.
    pub(super) before: u64,
    /// Entries of the log after the response.
    pub(super) after: u64,
    /// Why the call failed, if it did.
    pub(super) error: Option<String>,
}

/// Runs the scenario on `WORK/disk` and records each call in `WORK/calls.jsonl`. Writes the number
/// of log entries to `WORK/end`.
pub(super) fn record(work: &Path, seed: u64) -> Result<()> {
    let log = work.join("log.img");
    let mut chance = fastrand::Rng::with_seed(seed);
    let mut daemon = Daemon::on(&work.join("disk"), work)?;
    daemon.start(&work.join("record.log"))?;
    let mut calls = File::create(work.join("calls.jsonl"))?;
    for step in SCENARIO {
        rest([0, 0, 200][chance.usize(0..3)]);
        if let Some(recorded) = take(step, &daemon, &log, work, &mut chance)? {
            writeln!(calls, "{}", serde_json::to_string(&recorded)?)?;
        }
    }
    rest(2000);
    fs::write(work.join("end"), log::count(&log)?.to_string())?;
    Ok(())
}

fn take(
    step: &Step,
    daemon: &Daemon,
    log: &Path,
    work: &Path,
    chance: &mut fastrand::Rng,
) -> Result<Option<Recorded>> {
    let mount = work.join("mnt");
    match *step {
        Step::Settle => run_program("sync", &["-f", &text(&mount)])?,
        Step::Pause => rest([500, 6000][chance.usize(0..2)]),
        Step::Call(promise, call) => return made(daemon, log, promise, &words(call), "").map(Some),
        Step::CallWith(promise, call, input) => {
            return made(daemon, log, promise, &words(call), input).map(Some);
        }
        Step::CallDuringSync(promise, call) => {
            let syncing = thread::spawn(move || {
                rest(1500);
                run_program("sync", &["-f", &text(&mount)])
            });
            let recorded = made(daemon, log, promise, &words(call), "")?;
            syncing.join().expect("the thread that syncs does not panic")?;
            return Ok(Some(recorded));
        }
        Step::Write(sandbox, value) => {
            let script = format!("echo {value} | dd of=$HOME/f conv=notrunc,fdatasync");
            let before = log::count(log)?;
            let answer = daemon.call(&["exec", sandbox, "--", "sh", "-c", &script], "")?;
            return Ok(Some(Recorded {
                subject: format!("data:{sandbox}"),
                state: Some(value.into()),
                id: None,
                key: None,
                before,
                after: log::count(log)?,
                error: (!answer.is_ok()).then_some(answer.error),
            }));
        }
    }
    Ok(None)
}

/// Makes one call and records what its response promises.
fn made(
    daemon: &Daemon,
    log: &Path,
    promise: Promise,
    call: &[&str],
    input: &str,
) -> Result<Recorded> {
    let before = log::count(log)?;
    let answer = daemon.call(call, input)?;
    let after = log::count(log)?;
    let json = answer.json.clone().unwrap_or(Value::Null);
    let field = |name: &str| json[name].as_str().map(str::to_owned);
    let (subject, state) = match promise {
        Promise::Is(subject, state) => (subject, Some(state.to_owned())),
        Promise::Key(subject) => (subject, field("api_key")),
        Promise::Changed(subject) => (subject, field("updated_at")),
        Promise::Gone(subject) => (subject, None),
    };
    Ok(Recorded {
        subject: subject.into(),
        state,
        id: field("id").or_else(|| json["sandboxes"][0]["id"].as_str().map(str::to_owned)),
        key: field("api_key"),
        before,
        after,
        error: (!answer.is_ok()).then_some(answer.error),
    })
}

fn words(call: &str) -> Vec<&str> {
    call.split(' ').collect()
}

/// Sleeps. The test is about the page cache, so time must pass.
fn rest(milliseconds: u64) {
    let until = Instant::now() + Duration::from_millis(milliseconds);
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        thread::park_timeout(left);
    }
}
