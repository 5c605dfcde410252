//! An agent for one test.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::{AgentClient, CallError, ExecEvent, ExecInput, ExecOutput, UnixChannel};
use bhatti_proto::{ExecRequest, Frame, FrameReader, FrameType, FrameWriter};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Child;
use tokio::time::{sleep, timeout};

/// The timeout of each step.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// An agent that runs until it is dropped.
pub(crate) struct Agent {
    pub(crate) client: AgentClient,
    pub(crate) process: Child,
    pub(crate) directory: tempfile::TempDir,
}

/// Returns the path of the agent's binary: that of `make build`, or `BHATTI_LOHAR`.
pub(crate) fn lohar() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../dist/lohar");
    std::env::var_os("BHATTI_LOHAR").map_or(built, PathBuf::from)
}

impl Agent {
    pub(crate) async fn start() -> Self {
        Self::start_with("{}").await
    }

    /// Starts an agent with `limits`, in JSON, over the default ones.
    pub(crate) async fn start_with(limits: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("work")).unwrap();
        Self::start_in(directory, limits).await
    }

    /// Kills the agent, and starts another one on the same directory. Processes that the first
    /// agent started may go on.
    pub(crate) async fn start_anew(mut self) -> Self {
        self.process.kill().await.unwrap();
        for socket in ["control", "forward"] {
            std::fs::remove_file(self.directory.path().join(socket)).unwrap();
        }
        Self::start_in(self.directory, "{}").await
    }

    async fn start_in(directory: tempfile::TempDir, limits: &str) -> Self {
        let channel = UnixChannel {
            control: directory.path().join("control"),
            forward: directory.path().join("forward"),
        };
        let process = bhatti_host::process::command(lohar())
            .envs([("LOHAR_TEST", "1".as_ref()), ("LOHAR_SOCK", channel.control.as_os_str())])
            .env("LOHAR_FWD_SOCK", &channel.forward)
            .env("LOHAR_STATE_DIR", directory.path().join("state"))
            .env("LOHAR_LIMITS", limits)
            .current_dir(directory.path().join("work"))
            .spawn()
            .expect("dist/lohar is there: run `make build` first");
        let ready = || std::os::unix::net::UnixStream::connect(&channel.forward).is_ok();
        until("the agent listens", ready).await;
        Self { client: AgentClient::new(Arc::new(channel)), process, directory }
    }

    /// Returns a path in the test's working directory.
    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join("work").join(name).to_str().unwrap().to_owned()
    }

    pub(crate) async fn start_command(&self, argv: &[&str]) -> (ExecInput, ExecOutput) {
        self.client.exec(command(argv)).await.unwrap()
    }

    pub(crate) async fn run(&self, argv: &[&str]) -> Result<Ran, CallError> {
        let (mut input, output) = self.start_command(argv).await;
        // If the command did not start, its input cannot be ended.
        drop(input.end().await);
        collect(output).await
    }

    pub(crate) async fn run_request(&self, request: ExecRequest) -> Result<Ran, CallError> {
        let (_input, output) = self.client.exec(request).await.unwrap();
        collect(output).await
    }

    pub(crate) async fn run_shell(&self, script: &str) -> Ran {
        self.run(&["sh", "-c", script]).await.unwrap()
    }

    /// Runs a job to its end, attached to it.
    pub(crate) async fn run_job(&self, request: ExecRequest) -> Ran {
        let (_info, _input, mut output) = self.client.create_session(request).await.unwrap();
        let mut ran = Ran::default();
        loop {
            let event = timeout(LIMIT, output.next()).await.expect("the job ends in time");
            match event.unwrap() {
                ExecEvent::Stdout(bytes) => ran.stdout.extend_from_slice(&bytes),
                ExecEvent::Stderr(bytes) => ran.stderr.extend_from_slice(&bytes),
                ExecEvent::TimedOut => ran.timed_out = true,
                ExecEvent::Exit(code) => {
                    ran.code = code;
                    return ran;
                }
            }
        }
    }

    /// Connects to the control service, for raw frames.
    pub(crate) async fn raw(&self) -> Raw {
        Raw::connect(&self.directory.path().join("control")).await
    }

    /// Connects to the forward service, for raw frames.
    pub(crate) async fn raw_forward(&self) -> Raw {
        Raw::connect(&self.directory.path().join("forward")).await
    }
}

/// A connection on which a test sends raw frames.
pub(crate) struct Raw {
    pub(crate) reader: FrameReader<OwnedReadHalf>,
    pub(crate) writer: FrameWriter<OwnedWriteHalf>,
}

impl Raw {
    async fn connect(path: &Path) -> Self {
        let (reader, writer) = UnixStream::connect(path).await.unwrap().into_split();
        Self { reader: FrameReader::new(reader), writer: FrameWriter::new(writer) }
    }

    pub(crate) async fn send(&mut self, frame_type: FrameType, payload: &str) {
        self.writer.send(frame_type, payload.as_bytes()).await.unwrap();
    }

    /// Receives the next frame. Returns `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        timeout(LIMIT, self.reader.next()).await.expect("the agent answers").unwrap()
    }

    /// Receives the next frame as type and text.
    pub(crate) async fn text(&mut self) -> (FrameType, String) {
        let frame = self.next().await.expect("the agent sends a frame");
        (frame.frame_type, String::from_utf8_lossy(&frame.payload).into_owned())
    }
}

pub(crate) fn command(argv: &[&str]) -> ExecRequest {
    let argv = argv.iter().map(|&argument| argument.to_owned()).collect();
    ExecRequest { argv, ..ExecRequest::default() }
}

pub(crate) fn shell(script: &str) -> ExecRequest {
    command(&["sh", "-c", script])
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) code: i32,
    pub(crate) timed_out: bool,
}

impl Ran {
    pub(crate) fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

pub(crate) async fn collect(mut output: ExecOutput) -> Result<Ran, CallError> {
    let mut ran = Ran::default();
    loop {
        match timeout(LIMIT, output.next()).await.expect("the command ends in time")? {
            ExecEvent::Stdout(bytes) => ran.stdout.extend_from_slice(&bytes),
            ExecEvent::Stderr(bytes) => ran.stderr.extend_from_slice(&bytes),
            ExecEvent::TimedOut => ran.timed_out = true,
            ExecEvent::Exit(code) => {
                ran.code = code;
                return Ok(ran);
            }
        }
    }
}

/// Waits until `holds` returns true.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("{what}: not within {LIMIT:?}"));
}

/// Waits until a process has ended. When it is reaped is not the agent's concern.
pub(crate) async fn gone(pid: &str) {
    let stat = format!("/proc/{}/stat", pid.trim());
    let ended = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
    until(&format!("process {pid} is gone"), ended).await;
}
