//! Faults of the machine, in the system calls of processes that know nothing of it.

use std::fs;
use std::path::{Path, PathBuf};

use bhatti_host::process::command;
use tokio::process::Child;

use crate::daemon::std_command;
use crate::wait_for;

/// System calls of a process that fail with an input/output error, by strace(1).
pub struct FailingCalls {
    strace: Child,
    trace: PathBuf,
}

impl FailingCalls {
    /// Has the system calls `calls`, separated by commas, of the process `pid` fail whenever they are about `path`: one that they name, or have
    /// open. What happens is written to `trace`. Needs root.
    ///
    /// # Panics
    ///
    /// Panics if strace cannot be started.
    pub async fn begin(pid: u32, calls: &str, path: &Path, trace: &Path) -> Self {
        let said = trace.with_extension("said");
        let mut strace = command("strace");
        strace.args(["-f", "-p", &pid.to_string(), "-P"]).arg(path);
        strace.arg("-e").arg(format!("inject={calls}:error=EIO")).arg("-o").arg(trace);
        strace.stderr(fs::File::create(&said).expect("a file can be made"));
        let strace = strace.spawn().expect("strace is installed");
        let attached = || fs::read_to_string(&said).is_ok_and(|said| said.contains("attached"));
        wait_for("strace to have the process", attached).await;
        Self { strace, trace: trace.to_owned() }
    }

    /// Lets them succeed again. Returns how many failed.
    ///
    /// # Panics
    ///
    /// Panics if strace cannot be ended.
    pub async fn end(mut self) -> usize {
        let pid = self.strace.id().expect("it runs").to_string();
        assert!(std_command("kill", &["-TERM", &pid]), "it can be told to end");
        self.strace.wait().await.expect("it ends");
        fs::read_to_string(&self.trace).expect("it has written").matches("(INJECTED)").count()
    }
}
