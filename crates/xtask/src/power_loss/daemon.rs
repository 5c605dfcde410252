//! The tested daemon, on a mounted disk, in its own namespaces.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{LISTEN, disk, run_program, text, wait_until};

/// Time limit of one call of the command line, in seconds.
const CALL_LIMIT: &str = "120";

/// A data directory on a mounted disk, and the daemon on it.
#[derive(Debug)]
pub(super) struct Daemon {
    program: PathBuf,
    pub(super) data: PathBuf,
    process: Option<Child>,
}

/// The outcome of a call of the command line.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// The JSON that it printed, if it succeeded.
    pub(super) json: Option<Value>,
    pub(super) error: String,
}

impl Answer {
    pub(super) const fn is_ok(&self) -> bool {
        self.json.is_some()
    }
}

impl Daemon {
    /// Mounts the disk below `work` and makes the data directory on it if it is missing. Starts no
    /// daemon.
    pub(super) fn on(disk: &Path, work: &Path) -> Result<Self> {
        run_program("ip", &["link", "set", "lo", "up"])?;
        // Two workers have sandboxes with the same ids, which must not share control groups.
        run_program("mount", &["-t", "tmpfs", "tmpfs", "/sys/fs/cgroup"])?;
        let mount = work.join("mnt");
        disk::mount(disk, &mount)?;
        let data = mount.join("data");
        if !data.exists() {
            run_program("mkdir", &["-m", "700", &text(&data)])?;
        }
        Ok(Self { program: bhatti_testkit::dist("bhatti").canonicalize()?, data, process: None })
    }

    /// Starts the daemon and waits until it answers and has adopted every sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon ends before, or takes more than 60 s.
    pub(super) fn start(&mut self, log: &Path) -> Result<()> {
        let file = File::create(log)?;
        let mut command = Command::new(&self.program);
        command.args(["serve", "--listen", LISTEN, "--data-dir"]).arg(&self.data);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let process = self.process.insert(command.spawn().context("bhatti serve")?);
        let mut ended = false;
        let ready = wait_until(Duration::from_secs(60), || {
            ended = matches!(process.try_wait(), Ok(Some(_)));
            ended || taking_up() == Some(0)
        });
        ensure!(!ended, "the daemon ended during its start");
        ensure!(ready, "the daemon did not become ready");
        // The command line uses the local socket, which the daemon opens a moment after the port.
        let calls = || self.call(&["list"], "").is_ok_and(|answer| answer.is_ok());
        ensure!(
            wait_until(Duration::from_secs(10), calls),
            "the daemon does not answer on its local socket"
        );
        Ok(())
    }

    /// Stops the daemon with SIGTERM, and waits for its end.
    pub(super) fn stop(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        run_program("kill", &["-TERM", &process.id().to_string()])?;
        ensure!(process.wait()?.success(), "the daemon did not end cleanly");
        Ok(())
    }

    /// Calls the command line as the admin.
    pub(super) fn call(&self, arguments: &[&str], input: &str) -> Result<Answer> {
        self.run(&["--data-dir", &text(&self.data)], arguments, input)
    }

    /// Calls the command line with an API key.
    pub(super) fn call_as(&self, key: &str, arguments: &[&str]) -> Result<Answer> {
        self.run(&["--url", &format!("http://{LISTEN}"), "--token", key], arguments, "")
    }

    /// Returns the rows of a list command.
    ///
    /// # Errors
    ///
    /// Returns an error if the command fails, because its output would not prove that a row is
    /// missing.
    pub(super) fn list(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let answer = self.call(arguments, "")?;
        ensure!(answer.is_ok(), "bhatti {}: {}", arguments.join(" "), answer.error);
        Ok(answer.json.and_then(|json| json.as_array().cloned()).unwrap_or_default())
    }

    fn run(&self, identity: &[&str], arguments: &[&str], input: &str) -> Result<Answer> {
        let mut command = Command::new("timeout");
        command.arg(CALL_LIMIT).arg(&self.program).args(identity).arg("--json").args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("timeout")?;
        let mut stdin = child.stdin.take().context("a pipe")?;
        // A command that reads no input may have ended already.
        let _not_read = stdin.write_all(input.as_bytes());
        drop(stdin);
        let ran = child.wait_with_output()?;
        let error = String::from_utf8_lossy(&ran.stderr).trim().to_owned();
        if !ran.status.success() {
            return Ok(Answer { json: None, error });
        }
        let json = serde_json::from_slice(&ran.stdout).unwrap_or(Value::Null);
        Ok(Answer { json: Some(json), error })
    }
}

/// Returns the number of sandboxes that the daemon has yet to adopt, if it answers.
fn taking_up() -> Option<u64> {
    let health = Command::new("curl")
        .args(["-sf", "--max-time", "5", &format!("http://{LISTEN}/health")])
        .output();
    let health: Value = serde_json::from_slice(&health.ok()?.stdout).ok()?;
    health["taking_up"].as_u64()
}

/// Puts the images and a base snapshot onto the disk, so that no creation boots.
pub(super) fn prepare(work: &Path) -> Result<()> {
    let base = work.join("base.img");
    let mut daemon = Daemon::on(&base, work)?;
    let images = bhatti_testkit::repository().canonicalize()?.join("target/test-data/images");
    run_program(
        "cp",
        &["-a", "--sparse=always", &text(&images), &text(&daemon.data.join("images"))],
    )?;
    daemon.start(&work.join("prepare.log"))?;
    for call in [&["create", "--name", "first"][..], &["destroy", "--yes", "first"]] {
        let answer = daemon.call(call, "")?;
        if !answer.is_ok() {
            bail!("bhatti {}: {}", call.join(" "), answer.error);
        }
    }
    daemon.stop()?;
    run_program("sync", &["-f", &text(&daemon.data)])
}
