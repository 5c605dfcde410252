//! Injects machine faults into the system calls of unmodified processes.

use std::fs;
use std::path::{Path, PathBuf};

use bhatti_host::process::command;
use tokio::process::Child;

use crate::tool::std_command;
use crate::wait_for;

/// Makes system calls of a process fail with EIO, with strace(1).
pub struct FailingCalls {
    strace: Child,
    trace: PathBuf,
}

impl FailingCalls {
    /// Makes the system calls `calls`, separated by commas, of the process `pid` fail whenever they
    /// name `path` or use a descriptor of it. strace writes the calls to `trace`. Needs root.
    ///
    /// # Panics
    ///
    /// Panics if strace cannot be started.
    pub async fn begin(pid: u32, calls: &str, path: &Path, trace: &Path) -> Self {
        let log = trace.with_extension("log");
        let mut strace = command("strace");
        strace.args(["-f", "-p", &pid.to_string(), "-P"]).arg(path);
        strace.arg("-e").arg(format!("inject={calls}:error=EIO")).arg("-o").arg(trace);
        strace.stderr(fs::File::create(&log).expect("a file can be made"));
        let strace = strace.spawn().expect("strace is installed");
        let attached = || fs::read_to_string(&log).is_ok_and(|log| log.contains("attached"));
        wait_for("strace to attach", attached).await;
        Self { strace, trace: trace.to_owned() }
    }

    /// Lets the calls succeed again. Returns the number of calls that failed.
    ///
    /// # Panics
    ///
    /// Panics if strace cannot be ended.
    pub async fn end(mut self) -> usize {
        let pid = self.strace.id().expect("strace runs").to_string();
        assert!(std_command("kill", &["-TERM", &pid]), "strace could not be ended");
        self.strace.wait().await.expect("strace ends");
        fs::read_to_string(&self.trace).expect("strace wrote it").matches("(INJECTED)").count()
    }
}
