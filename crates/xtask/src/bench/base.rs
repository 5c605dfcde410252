//! Compares this tree with another revision: two daemons on one machine perform the same operations
//! in turns.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bhatti_api::StartSandbox;
use bhatti_host::process;
use bhatti_testkit::{Api, Serve, TestDaemon, named, wait_for};
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::api::{kept, send};
use super::check::{Ratio, ratio};
use super::forks::VM_PRACTISES;
use super::{exec, median};

/// Samples of quick and of slow operations on each side, and runs before them that do not count.
const QUICK: usize = 200;
const SLOW: usize = 25;
const UNCOUNTED: usize = 3;

const SMALL: &str = "/sandboxes/bench/files?path=/workspace/small";

/// A measured operation.
#[derive(Clone, Copy)]
enum Deed {
    List,
    Exec,
    File,
    Wake,
    Create,
    StopAndStart,
}

impl Deed {
    const ALL: [Self; 6] =
        [Self::List, Self::Exec, Self::File, Self::Wake, Self::Create, Self::StopAndStart];

    const fn name(self) -> &'static str {
        match self {
            Self::List => "list of sandboxes",
            Self::Exec => "exec `true` over HTTP",
            Self::File => "a file of 1 KiB written and read",
            Self::Wake => "exec in a paused sandbox",
            Self::Create => "create and first exec, without a network",
            Self::StopAndStart => "stop and start",
        }
    }

    const fn rounds(self) -> usize {
        match self {
            Self::List | Self::Exec | Self::File | Self::Wake => QUICK,
            Self::Create | Self::StopAndStart => SLOW,
        }
    }
}

/// Builds `revision` and measures it beside this tree. Without `revision`, takes the merge base
/// with the main branch, which on that branch itself is the last commit.
pub(super) async fn measure(revision: Option<&str>) -> Result<()> {
    let revision = match revision {
        Some(revision) => git(&["rev-parse", "--verify", revision]).await?,
        None => merge_base().await?,
    };
    println!("this tree beside {}", git(&["log", "-1", "--format=%h %s", &revision]).await?);
    let base = build(&revision).await?;
    let mut base = Side::start(base).await?;
    let mut own = Side::start(bhatti_testkit::dist("bhatti")).await?;
    println!(
        "{:44} {:>4} {:>10} {:>10} {:>6} {:>15}",
        "", "n", "base", "now", "ratio", "95 % interval"
    );
    for deed in Deed::ALL {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for round in 0..deed.rounds() + UNCOUNTED {
            // The sides take turns to begin, so that neither always runs with the caches that the
            // other has left.
            let (first, second) =
                if round % 2 == 0 { (&mut base, &mut own) } else { (&mut own, &mut base) };
            let (one, other) = (first.time(deed).await?, second.time(deed).await?);
            let (one, other) = if round % 2 == 0 { (one, other) } else { (other, one) };
            if round >= UNCOUNTED {
                before.push(one);
                after.push(other);
            }
        }
        report(deed.name(), &mut before, &mut after);
    }
    base.end().await?;
    own.end().await
}

fn report(what: &str, before: &mut [Duration], after: &mut [Duration]) {
    let Ratio { value, low, high } = ratio(after, before);
    let verdict = if low > 1.0 {
        "slower"
    } else if high < 1.0 {
        "faster"
    } else {
        "no significant difference"
    };
    let ms = |times: &mut [Duration]| format!("{:.2} ms", median(times).as_secs_f64() * 1e3);
    let (count, before, after) = (after.len(), ms(before), ms(after));
    println!(
        "{what:44} {count:>4} {before:>10} {after:>10} {value:>6.2} {low:>7.2}–{high:<7.2} {verdict}"
    );
}

/// A daemon of one of the two revisions, with a sandbox.
struct Side {
    daemon: TestDaemon,
    sender: SendRequest<Full<Bytes>>,
}

impl Side {
    async fn start(program: PathBuf) -> Result<Self> {
        let config = "network: off\n".to_owned();
        let daemon = TestDaemon::start_with(Serve { config, program, ..Serve::default() }).await;
        daemon.client.create(&named("bench")).await?;
        let sender = kept(&Api::admin(&daemon)).await?;
        Ok(Self { daemon, sender })
    }

    async fn time(&mut self, deed: Deed) -> Result<Duration> {
        let client = &self.daemon.client;
        match deed {
            Deed::Wake => client.pause("bench").await.map(drop)?,
            Deed::Create => {
                // The VM of the sandbox `bench`, and a spare.
                wait_for("the spare VM", || self.daemon.all_vmm_pids().len() == 2).await;
                sleep(VM_PRACTISES).await;
            }
            Deed::List | Deed::Exec | Deed::File | Deed::StopAndStart => {}
        }
        let began = Instant::now();
        match deed {
            Deed::List => drop(self.send("GET", "/sandboxes", String::new()).await?),
            Deed::Exec => {
                let body = json!({ "cmd": ["true"] }).to_string();
                self.send("POST", "/sandboxes/bench/exec", body).await?;
            }
            Deed::File => {
                self.send("PUT", SMALL, "x".repeat(1 << 10)).await?;
                self.send("GET", SMALL, String::new()).await?;
            }
            Deed::Wake => exec(&self.daemon.client, &["true"]).await?,
            Deed::Create => {
                let new = self.daemon.client.create(&named("new")).await?;
                bhatti_testkit::run(&self.daemon.client, &new.id, &["true"]).await?;
            }
            Deed::StopAndStart => {
                self.daemon.client.stop("bench").await?;
                self.daemon.client.start("bench", &StartSandbox::default()).await?;
            }
        }
        let took = began.elapsed();
        if matches!(deed, Deed::Create) {
            self.daemon.client.destroy("new").await?;
        }
        Ok(took)
    }

    async fn send(&mut self, method: &str, path: &str, body: String) -> Result<Bytes> {
        send(&mut self.sender, method, path, body).await
    }

    async fn end(self) -> Result<()> {
        self.daemon.client.destroy("bench").await?;
        Ok(())
    }
}

/// Returns the merge base of this tree and the main branch, or the last commit if there is none.
async fn merge_base() -> Result<String> {
    for main in ["origin/main", "main"] {
        if let Ok(base) = git(&["merge-base", "HEAD", main]).await {
            return Ok(base);
        }
    }
    git(&["rev-parse", "HEAD"]).await
}

async fn git(arguments: &[&str]) -> Result<String> {
    let output = process::command("git").args(arguments).output().await?;
    ensure!(output.status.success(), "git: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Builds a revision's programs. Returns the path of its `bhatti`, which has its `lohar` beside it.
async fn build(revision: &str) -> Result<PathBuf> {
    let place = env::current_dir()?.join("target/base");
    let (tree, programs) = (place.join("tree"), place.join(revision));
    if programs.join("bhatti").exists() {
        return Ok(programs.join("bhatti"));
    }
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    fs::create_dir_all(&tree)?;
    let archive = place.join("tree.tar");
    let (from, to) = (archive.to_string_lossy(), tree.to_string_lossy());
    git(&["archive", "--output", &from, revision]).await?;
    let unpacked = process::command("tar").args(["-xf", &from, "-C", &to]).status().await?;
    ensure!(unpacked.success(), "the revision could not be unpacked");
    let target = place.join("build");
    cargo(&tree, &target, &["--release", "--package", "bhatti"]).await?;
    cargo(&tree, &target, &["--profile", "agent", "--package", "lohar"]).await?;
    fs::create_dir_all(&programs)?;
    let triple = target.join(format!("{}-unknown-linux-gnu", env::consts::ARCH));
    fs::copy(triple.join("agent/lohar"), programs.join("lohar"))?;
    // `bhatti` is copied last, because its existence means that both programs are complete.
    fs::copy(triple.join("release/bhatti"), programs.join("bhatti"))?;
    Ok(programs.join("bhatti"))
}

async fn cargo(tree: &Path, target: &Path, arguments: &[&str]) -> Result<()> {
    let program = env::var_os("CARGO").context("CARGO is not set: run this by `cargo xtask`")?;
    let mut command = process::command(program);
    command.envs(env::vars_os()).env("CARGO_TARGET_DIR", target).current_dir(tree);
    let built = command.args(["build", "--locked"]).args(arguments).stdout(Stdio::null());
    ensure!(built.status().await?.success(), "the revision could not be built");
    Ok(())
}
