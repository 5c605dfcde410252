//! The agent in test mode, as a subprocess, asked by the client.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::{AgentClient, CallError, ExecEvent, ExecInput, ExecOutput, UnixChannel};
use bhatti_proto::{ErrorKind, ExecRequest};
use tokio::process::Child;
use tokio::time::{sleep, timeout};

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(20);

/// An agent of this test's own.
struct Agent {
    client: AgentClient,
    _process: Child,
    directory: tempfile::TempDir,
}

/// The agent's binary: what `make build` made, or the one that `BHATTI_LOHAR` names.
fn lohar() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../dist/lohar");
    std::env::var_os("BHATTI_LOHAR").map_or(built, PathBuf::from)
}

impl Agent {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let channel = UnixChannel {
            control: directory.path().join("control"),
            forward: directory.path().join("forward"),
        };
        let process = bhatti_host::process::command(lohar())
            .envs([("LOHAR_TEST", "1".as_ref()), ("LOHAR_SOCK", channel.control.as_os_str())])
            .env("LOHAR_FWD_SOCK", &channel.forward)
            .current_dir(directory.path())
            .spawn()
            .expect("dist/lohar is there: run `make build` first");
        timeout(LIMIT, async {
            while !channel.forward.exists() {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        Self { client: AgentClient::new(Arc::new(channel)), _process: process, directory }
    }

    async fn start_command(&self, argv: &[&str]) -> (ExecInput, ExecOutput) {
        let argv = argv.iter().map(|&argument| argument.to_owned()).collect();
        self.client.exec(ExecRequest { argv, ..ExecRequest::default() }).await.unwrap()
    }

    async fn run(&self, argv: &[&str]) -> Result<Ran, CallError> {
        let (mut input, output) = self.start_command(argv).await;
        input.end().await.unwrap();
        collect(output).await
    }

    async fn run_request(&self, request: ExecRequest) -> Result<Ran, CallError> {
        let (_input, output) = self.client.exec(request).await.unwrap();
        collect(output).await
    }

    async fn run_shell(&self, script: &str) -> Ran {
        self.run(&["sh", "-c", script]).await.unwrap()
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Ran {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    code: i32,
    timed_out: bool,
}

impl Ran {
    fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

async fn collect(mut output: ExecOutput) -> Result<Ran, CallError> {
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

fn every_byte(length: usize) -> Vec<u8> {
    (0..=255).cycle().take(length).collect()
}

#[tokio::test]
async fn streams_and_exit_code_are_told_apart() {
    let agent = Agent::start().await;

    let ran = agent.run_shell("echo out; echo err >&2; exit 42").await;

    assert_eq!(
        ran,
        Ran { stdout: b"out\n".into(), stderr: b"err\n".into(), code: 42, timed_out: false }
    );
}

#[tokio::test]
async fn death_by_signal_is_128_plus_the_signal() {
    let agent = Agent::start().await;

    assert_eq!(agent.run_shell("kill -TERM $$").await.code, 143);
    assert_eq!(agent.run_shell("kill -KILL $$").await.code, 137);
}

#[tokio::test]
async fn environment_is_the_default_one_with_the_requests_over_it() {
    let agent = Agent::start().await;
    let env =
        [("LANG", "C"), ("MINE", "a b=c\n'\"")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();

    let ran = agent
        .run_request(ExecRequest {
            argv: vec!["env".into(), "-0".into()],
            env,
            ..ExecRequest::default()
        })
        .await
        .unwrap();

    let mut variables: Vec<_> = ran.stdout().split_terminator('\0').collect();
    variables.sort_unstable();
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(variables, ["HOME=/root", "LANG=C", "MINE=a b=c\n'\"", path, "TERM=xterm-256color"]);
}

#[tokio::test]
async fn program_is_looked_up_in_the_childs_own_path() {
    let agent = Agent::start().await;
    let tool = agent.directory.path().join("my-tool");
    std::fs::write(&tool, "#!/bin/sh\necho mine\n").unwrap();
    std::fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", agent.directory.path().display());

    let ran = agent
        .run_request(ExecRequest {
            argv: vec!["my-tool".into()],
            env: [("PATH".to_owned(), path)].into(),
            ..ExecRequest::default()
        })
        .await
        .unwrap();

    assert_eq!(ran.stdout(), "mine\n");
}

#[tokio::test]
async fn working_directory_is_the_requests() {
    let agent = Agent::start().await;
    let request = |cwd: &str| ExecRequest {
        argv: vec!["pwd".into()],
        cwd: Some(cwd.to_owned()),
        ..ExecRequest::default()
    };

    assert_eq!(agent.run_request(request("/usr/bin")).await.unwrap().stdout(), "/usr/bin\n");
    let error = agent.run_request(request("/no/such")).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Agent(start) if start.kind == ErrorKind::BadCwd),
        "{error}"
    );
}

#[tokio::test]
async fn command_that_cannot_start_says_why() {
    let agent = Agent::start().await;
    let cases = [
        (
            vec!["nope-zz"],
            ErrorKind::NotFound,
            r#"start: exec: "nope-zz": executable file not found in $PATH"#,
        ),
        (
            vec!["/no/such"],
            ErrorKind::NotFound,
            "start: fork/exec /no/such: no such file or directory",
        ),
        (
            vec!["/etc/passwd"],
            ErrorKind::NotExecutable,
            "start: fork/exec /etc/passwd: permission denied",
        ),
        (vec![], ErrorKind::BadRequest, "empty argv"),
    ];

    for (argv, kind, message) in cases {
        let error = agent.run(&argv).await.unwrap_err();
        let CallError::Agent(start) = &error else { panic!("{argv:?}: {error}") };
        assert_eq!((start.kind, start.message.as_str()), (kind, message));
    }
}

#[tokio::test]
async fn eight_mebibytes_of_every_byte_survive_both_ways() {
    let agent = Agent::start().await;
    let bytes = every_byte(8 << 20);
    let (mut input, output) = agent.start_command(&["cat"]).await;
    let sent = bytes.clone();

    let sending = tokio::spawn(async move {
        input.write(&sent).await.unwrap();
        input.end().await.unwrap();
        input
    });
    let ran = collect(output).await.unwrap();

    sending.await.unwrap();
    assert!(ran.stdout == bytes, "{} bytes came back", ran.stdout.len());
}

#[tokio::test]
async fn grandchild_that_holds_the_output_delays_nothing() {
    let agent = Agent::start().await;

    let ran =
        timeout(Duration::from_secs(10), agent.run_shell("sleep 1000 & echo $!")).await.unwrap();

    let grandchild: u32 = ran.stdout().trim().parse().unwrap();
    end_sleep(grandchild).await;
    assert_eq!(ran.code, 0);
}

/// Ends a `sleep` that a test left behind on purpose.
async fn end_sleep(pid: u32) {
    assert!(std::fs::read(format!("/proc/{pid}/cmdline")).unwrap().starts_with(b"sleep"));
    let killed = bhatti_host::process::command("kill").arg(pid.to_string()).status().await.unwrap();
    assert!(killed.success());
}

#[tokio::test]
async fn output_written_just_before_the_exit_arrives_whole() {
    let agent = Agent::start().await;

    for _ in 0..50 {
        let ran = agent.run(&["head", "-c", "60000", "/dev/zero"]).await.unwrap();
        assert_eq!((ran.stdout.len(), ran.code), (60_000, 0));
    }
}

#[tokio::test]
async fn kill_takes_the_whole_process_group() {
    let agent = Agent::start().await;
    let (mut input, mut output) =
        agent.start_command(&["sh", "-c", "sleep 1000 & echo $!; wait"]).await;
    let ExecEvent::Stdout(pid) = output.next().await.unwrap() else { panic!("no pid") };
    let child = format!("/proc/{}", std::str::from_utf8(&pid).unwrap().trim());

    input.kill().await.unwrap();

    assert_eq!(collect(output).await.unwrap().code, 137);
    gone(&child).await;
}

#[tokio::test]
async fn signal_reaches_the_process_group() {
    let agent = Agent::start().await;
    let script = "trap 'echo got it; exit 7' USR1; echo ready; while :; do sleep 0.01; done";
    let (mut input, mut output) = agent.start_command(&["sh", "-c", script]).await;
    assert_eq!(output.next().await.unwrap(), ExecEvent::Stdout("ready\n".into()));

    input.signal(10).await.unwrap();

    let ran = collect(output).await.unwrap();
    assert_eq!((ran.stdout(), ran.code), ("got it\n", 7));
}

#[tokio::test]
async fn command_dies_with_its_client() {
    let agent = Agent::start().await;
    let (input, mut output) = agent.start_command(&["sh", "-c", "echo $$; exec sleep 1000"]).await;
    let ExecEvent::Stdout(pid) = output.next().await.unwrap() else { panic!("no pid") };

    drop((input, output));

    gone(&format!("/proc/{}", std::str::from_utf8(&pid).unwrap().trim())).await;
    assert_eq!(agent.run_shell("echo still here").await.stdout(), "still here\n");
}

#[tokio::test]
async fn thousand_short_commands_keep_their_exit_codes_and_leave_no_zombie() {
    let agent = Agent::start().await;
    let clients: Vec<_> = (0..10)
        .map(|_| {
            let client = agent.client.clone();
            tokio::spawn(async move {
                for code in 0..100 {
                    let argv = vec!["sh".into(), "-c".into(), format!("exit {code}")];
                    let (_input, output) =
                        client.exec(ExecRequest { argv, ..ExecRequest::default() }).await.unwrap();
                    assert_eq!(collect(output).await.unwrap().code, code);
                }
            })
        })
        .collect();

    for client in clients {
        client.await.unwrap();
    }

    let script = "ps -o stat= --ppid $(ps -o ppid= -p $$) | grep -c Z";
    assert_eq!(agent.run_shell(script).await.stdout(), "0\n");
}

#[tokio::test]
async fn shutdown_ends_the_agent() {
    let agent = Agent::start().await;

    agent.client.shut_down().await.unwrap();

    let Agent { _process: mut process, .. } = agent;
    let status = timeout(LIMIT, process.wait()).await.unwrap().unwrap();
    assert!(status.success());
}

async fn gone(process: &str) {
    timeout(LIMIT, async {
        while std::path::Path::new(process).exists() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{process} is still there"));
}
