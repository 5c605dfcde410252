//! The command line against a real daemon with a real VM.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::process::{Output, Stdio};

use bhatti_testkit::{LIMIT, TestDaemon, engine, kill_process, wait_for};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;

async fn run(daemon: &TestDaemon, arguments: &[&str]) -> Output {
    daemon.cli(arguments).output().await.unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

#[tokio::test]
async fn sandbox_is_created_used_and_destroyed_on_the_command_line() {
    let daemon = TestDaemon::start().await;

    let created = run(
        &daemon,
        &["create", "--name", "dev", "--cpus", "1", "--memory", "256", "--env", "A=b,c"],
    )
    .await;
    assert_eq!(created.status.code(), Some(0), "{}", stderr(&created));
    assert!(stdout(&created).ends_with("\tdev\n"));

    let listed = run(&daemon, &["list"]).await;
    let lines: Vec<&str> = stdout(&listed).lines().collect();
    assert!(
        lines[0].starts_with("ID\t")
            && lines[1].contains("\tdev\trunning (hot)\tminimal\t1\t256 MiB\t"),
        "{lines:?}"
    );
    let inspected = run(&daemon, &["--json", "inspect", "dev"]).await;
    let json: Value = serde_json::from_str(stdout(&inspected)).unwrap();
    assert_eq!((&json["name"], &json["env"]["A"]), (&Value::from("dev"), &Value::from("b,c")));

    let taken = run(&daemon, &["create", "--name", "dev"]).await;
    assert_eq!(taken.status.code(), Some(1));
    assert!(
        stderr(&taken).starts_with("error: sandbox `dev` already exists\nhint: "),
        "{}",
        stderr(&taken)
    );

    for (command, code) in [("exit 42", 42), ("kill -TERM $$", 143), ("true", 0)] {
        let ran = run(&daemon, &["exec", "dev", "--", "sh", "-c", command]).await;
        assert_eq!(ran.status.code(), Some(code), "{command}: {}", stderr(&ran));
    }
    let environment = run(
        &daemon,
        &["exec", "-e", "B=2", "-w", "/tmp", "dev", "--", "sh", "-c", "echo $A $B; pwd"],
    )
    .await;
    assert_eq!(stdout(&environment), "b,c 2\n/tmp\n");
    for (sandbox, command, code) in
        [("dev", "no-such", 127), ("dev", "/etc/passwd", 126), ("nobody", "true", 125)]
    {
        let failed = run(&daemon, &["exec", sandbox, "--", command]).await;
        assert_eq!(failed.status.code(), Some(code), "{sandbox} {command}");
        assert!(stderr(&failed).starts_with("error: "), "{}", stderr(&failed));
    }

    let as_json = run(
        &daemon,
        &["--json", "exec", "dev", "--", "sh", "-c", "printf 'a\\377'; echo b >&2; exit 3"],
    )
    .await;
    let json: Value = serde_json::from_str(stdout(&as_json)).unwrap();
    assert_eq!((as_json.status.code(), &json["exit_code"]), (Some(3), &Value::from(3)));
    assert_eq!(
        (&json["stderr"], &json["stdout_base64"]),
        (&Value::from("b\n"), &Value::from("Yf8="))
    );

    stdin_and_signals_reach_the_command(&daemon).await;

    let destroyed = run(&daemon, &["destroy", "dev"]).await;
    assert_eq!(stdout(&destroyed), "destroyed dev\n");
    assert_eq!(run(&daemon, &["destroy", "dev"]).await.status.code(), Some(5));
}

async fn stdin_and_signals_reach_the_command(daemon: &TestDaemon) {
    // With `-n`, the command does not read the input of, for example, a surrounding shell loop.
    let mut none = daemon.cli(&["exec", "-n", "dev", "--", "sh", "-c", "cat; echo end"]);
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let none = none.stdin(std::os::fd::OwnedFd::from(ours)).output();
    let none = tokio::time::timeout(bhatti_testkit::LIMIT, none)
        .await
        .expect("the command does not wait for input")
        .unwrap();
    assert_eq!(none.stdout, b"end\n");

    let mut cat = daemon.cli(&["exec", "dev", "--", "cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    cat.stdin.take().unwrap().write_all(b"\0\xff from here").await.unwrap();
    assert_eq!(cat.wait_with_output().await.unwrap().stdout, b"\0\xff from here");

    let script = "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 0.05; done";
    let mut waiting = daemon.cli(&["exec", "dev", "--", "sh", "-c", script]);
    let mut waiting = waiting.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(waiting.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("ready"));
    let pid = waiting.id().unwrap().to_string();
    let interrupted =
        bhatti_host::process::command("kill").args(["-INT", &pid]).status().await.unwrap();
    assert!(interrupted.success());
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("interrupted"));
    assert_eq!(waiting.wait().await.unwrap().code(), Some(9));
}

#[tokio::test]
async fn command_ends_when_its_cli_process_is_killed() {
    let daemon = TestDaemon::start().await;
    assert!(run(&daemon, &["create", "--name", "dev"]).await.status.success());
    let mut sleeping =
        daemon.cli(&["exec", "dev", "--", "sh", "-c", "echo ready; exec sleep 4321"]);
    let mut sleeping = sleeping.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(sleeping.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("ready"));

    kill_process(sleeping.id().unwrap());
    sleeping.wait().await.unwrap();

    command_is_gone(&daemon, "sleep 4321").await;
}

#[tokio::test]
async fn unread_input_delays_neither_signals_nor_exit() {
    let daemon = TestDaemon::start().await;
    assert!(run(&daemon, &["create", "--name", "dev"]).await.status.success());
    let flood = || std::fs::File::open("/dev/zero").unwrap();

    let mut quick =
        daemon.cli(&["exec", "dev", "--", "sh", "-c", "head -c 3000000 /dev/zero; exit 7"]);
    let quick = quick.stdin(flood()).output().await.unwrap();
    assert_eq!(
        (quick.stdout.len(), quick.status.code()),
        (3_000_000, Some(7)),
        "{}",
        stderr(&quick)
    );

    for (signal, code) in [("-INT", Some(130)), ("-KILL", None)] {
        let mut sleeping =
            daemon.cli(&["exec", "dev", "--", "sh", "-c", "echo ready; exec sleep 4322"]);
        let mut sleeping = sleeping.stdin(flood()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(sleeping.stdout.take().unwrap()).lines();
        assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("ready"));
        let pid = sleeping.id().unwrap().to_string();
        assert!(
            bhatti_host::process::command("kill")
                .args([signal, &pid])
                .status()
                .await
                .unwrap()
                .success()
        );
        assert_eq!(sleeping.wait().await.unwrap().code(), code);
        command_is_gone(&daemon, "sleep 4322").await;
    }
}

/// Waits until no process of the sandbox has the command line `command`.
async fn command_is_gone(daemon: &TestDaemon, command: &str) {
    for _ in 0..200 {
        let found = run(daemon, &["exec", "dev", "--", "pgrep", "-xf", command]).await;
        if found.status.code() == Some(1) {
            return;
        }
    }
    panic!("`{command}` outlives its client");
}

#[tokio::test]
async fn without_a_daemon_the_error_says_how_to_start_one() {
    let mut daemon = TestDaemon::start().await;
    daemon.kill().await;

    let failed = run(&daemon, &["list"]).await;

    assert_eq!(failed.status.code(), Some(1));
    assert!(stderr(&failed).contains("hint: start it with `bhatti serve`"), "{}", stderr(&failed));
}

#[tokio::test]
async fn second_interrupt_ends_a_command_whose_daemon_does_not_answer() {
    let directory = tempfile::tempdir().unwrap();
    let silent = tokio::net::UnixListener::bind(directory.path().join("bhatti.sock")).unwrap();
    let mut command = bhatti_host::process::command(bhatti_testkit::dist("bhatti"));
    command.arg("--data-dir").arg(directory.path()).args(["image", "pull", "any:1"]);
    let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
    let (_connection, _) = timeout(LIMIT, silent.accept()).await.unwrap().unwrap();
    let pid = rustix::process::Pid::from_raw(process.id().unwrap().cast_signed()).unwrap();

    // Signals that come at once count as one.
    let interrupted = async {
        while process.try_wait().unwrap().is_none() {
            rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, interrupted).await.unwrap();

    let ended = process.wait_with_output().await.unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(stderr(&ended).contains("interrupted before the daemon answered"), "{ended:?}");
}

#[tokio::test]
async fn doctor_finds_nothing_missing_on_this_machine() {
    let daemon = TestDaemon::start().await;
    wait_for("the socket", || daemon.data_dir().join("bhatti.sock").exists()).await;

    let examined = run(&daemon, &["--json", "doctor"]).await;

    let findings: Vec<Value> = serde_json::from_str(stdout(&examined)).unwrap();
    let missing: Vec<&Value> =
        findings.iter().filter(|finding| finding["verdict"] == "missing").collect();
    // The disk of a test machine may be too small.
    assert!(missing.iter().all(|finding| finding["what"] == "disk space"), "{missing:?}");
    // There may be several findings about firewalls, so subjects are counted, not findings.
    let looked_at: BTreeSet<_> = findings.iter().map(|finding| finding["what"].as_str()).collect();
    let has_landlock = looked_at.contains(&Some("landlock"));
    assert_eq!(has_landlock, engine() == "qemu", "only QEMU is confined by Landlock");
    let usual = if bhatti_testkit::is_root() { 10 } else { 12 };
    assert_eq!(looked_at.len(), usual + usize::from(has_landlock));
}

#[tokio::test]
async fn command_runs_in_a_sandbox_that_is_destroyed_afterwards() {
    let daemon = TestDaemon::start().await;

    let ran =
        run(&daemon, &["run", "-e", "A=1", "--", "sh", "-c", "echo $A; hostname; exit 7"]).await;

    assert_eq!(ran.status.code(), Some(7), "{}", stderr(&ran));
    assert!(stdout(&ran).starts_with("1\nsandbox-"), "{}", stdout(&ran));
    assert_eq!(stdout(&run(&daemon, &["ps", "--quiet"]).await), "");
    let unknown = run(&daemon, &["run", "--pull", "never", "no-such-image", "--", "true"]).await;
    assert_eq!(unknown.status.code(), Some(125));
    assert!(stderr(&unknown).contains("image `no-such-image` not found"), "{}", stderr(&unknown));
}

#[tokio::test]
async fn commands_need_no_dashes_and_old_spellings_work() {
    let daemon = TestDaemon::start().await;
    run(&daemon, &["create", "--name", "dev"]).await;

    let listed = run(&daemon, &["exec", "-w", "/", "dev", "ls", "-d", "/etc"]).await;
    assert_eq!(stdout(&listed), "/etc\n", "{}", stderr(&listed));
    let dashes = run(&daemon, &["exec", "dev", "echo", "--", "-n"]).await;
    assert_eq!(stdout(&dashes), "-- -n\n");

    // Options may stand behind the sandbox, before the command.
    let job = run(&daemon, &["exec", "dev", "-d", "--", "sh", "-c", "echo done; exit 3"]).await;
    let job = stdout(&job).trim().to_owned();
    for wait in [&["job", "wait", "dev"][..], &["wait", "dev"]] {
        let waited = run(&daemon, &[wait, &[&job]].concat()).await;
        assert_eq!(waited.status.code(), Some(3), "{wait:?}: {}", stderr(&waited));
    }
    for logs in [&["job", "logs", "dev"][..], &["logs", "dev"]] {
        assert_eq!(stdout(&run(&daemon, &[logs, &[&job]].concat()).await), "done\n", "{logs:?}");
    }
    for list in [&["jobs", "dev"][..], &["job", "list", "dev"], &["ps", "dev"]] {
        let listed = run(&daemon, list).await;
        assert!(stdout(&listed).contains(&format!("{job}\tjob\texited 3")), "{list:?}");
    }

    let sandboxes = run(&daemon, &["ps"]).await;
    assert!(stdout(&sandboxes).contains("\tdev\trunning"), "{}", stdout(&sandboxes));
    let local = daemon.data_dir().join("copied");
    let copied = run(&daemon, &["cp", "dev:/etc/hostname", &local.to_string_lossy()]).await;
    assert_eq!(copied.status.code(), Some(0), "{}", stderr(&copied));
    assert_eq!(std::fs::read_to_string(local).unwrap(), "dev\n");
}
