//! Commands: streams, codes, environment, users, signals, time limits.

use std::time::Duration;

use bhatti_agent::{CallError, ExecEvent};
use bhatti_proto::{ErrorKind, ExecRequest};
use tokio::time::timeout;

use crate::agent::{Agent, LIMIT, Ran, collect, gone};

fn every_byte(length: usize) -> Vec<u8> {
    (0..=255).cycle().take(length).collect()
}

#[tokio::test]
async fn stdout_stderr_and_exit_code_are_separate() {
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
async fn request_variables_override_the_default_environment() {
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
async fn program_is_looked_up_in_the_requests_path() {
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
async fn command_runs_in_the_requested_directory() {
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
async fn failed_start_reports_its_reason() {
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

/// A shell script that leaves a process behind and prints its process id. When the file `go`
/// appears, that process writes to both of the command's streams, creates the file `written`, and
/// then sleeps.
const BACKGROUND_WRITER: &str = "(while ! [ -e go ]; do sleep 0.01; done; echo late; echo late >&2; \
     touch written; exec sleep 1000) & echo $!";

#[tokio::test]
async fn background_process_outlives_its_command_and_delays_no_answer() {
    let agent = Agent::start().await;

    let ran = timeout(Duration::from_secs(10), agent.run_shell(BACKGROUND_WRITER)).await.unwrap();
    std::fs::write(agent.path("go"), "").unwrap();

    let written = agent.path("written");
    crate::agent::until("the process has written", || std::fs::exists(&written).unwrap()).await;
    assert_eq!(ran.code, 0);
    end_sleep(ran.stdout().trim().parse().unwrap()).await;
}

#[tokio::test]
async fn background_process_outlives_its_job() {
    let agent = Agent::start().await;

    let ran = agent.run_job(crate::agent::shell(BACKGROUND_WRITER)).await;
    std::fs::write(agent.path("go"), "").unwrap();

    let written = agent.path("written");
    crate::agent::until("the process has written", || std::fs::exists(&written).unwrap()).await;
    end_sleep(ran.stdout().trim().parse().unwrap()).await;
}

#[tokio::test]
async fn agent_serves_others_while_a_background_process_floods_its_output() {
    let agent = Agent::start().await;

    let ran = agent.run_shell("yes & echo $!").await;

    let pid = ran.stdout().lines().next().unwrap().to_owned();
    for _ in 0..100 {
        assert_eq!(agent.run_shell("echo here").await.stdout(), "here\n");
    }
    agent.run(&["kill", &pid]).await.unwrap();
    gone(&pid).await;
}

#[tokio::test]
async fn pipes_of_ended_commands_are_limited() {
    let agent = Agent::start_with(r#"{"discarded_pipes": 2}"#).await;
    let first = agent.run_shell("sleep 1000 & echo $!").await;

    // At the limit the agent closes the pipes of this command, and SIGPIPE ends its background
    // process.
    let second = agent.run_shell("(while echo line; do sleep 0.01; done) & echo $!").await;

    gone(second.stdout().lines().next().unwrap()).await;
    end_sleep(first.stdout().trim().parse().unwrap()).await;
}

/// Ends a `sleep` that a test left behind on purpose.
async fn end_sleep(pid: u32) {
    // Right after the fork, the process still has the command line of the shell.
    let command_line = format!("/proc/{pid}/cmdline");
    let is_sleep = || std::fs::read(&command_line).unwrap().starts_with(b"sleep");
    crate::agent::until("the grandchild sleeps", is_sleep).await;
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
async fn kill_ends_the_whole_process_group() {
    let agent = Agent::start().await;
    let (mut input, mut output) =
        agent.start_command(&["sh", "-c", "sleep 1000 & echo $!; wait"]).await;
    let ExecEvent::Stdout(pid) = output.next().await.unwrap() else { panic!("no pid") };
    let child = String::from_utf8(pid.to_vec()).unwrap();

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

    gone(std::str::from_utf8(&pid).unwrap()).await;
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

    let Agent { mut process, .. } = agent;
    let status = timeout(LIMIT, process.wait()).await.unwrap().unwrap();
    assert!(status.success());
}

#[tokio::test]
async fn time_limit_ends_the_whole_group_and_is_reported() {
    let agent = Agent::start().await;
    let request = ExecRequest {
        timeout_ms: Some(50),
        ..crate::agent::shell("echo begun; sleep 1000 & wait")
    };

    let ran = agent.run_request(request).await.unwrap();

    assert_eq!((ran.stdout(), ran.code, ran.timed_out), ("begun\n", 143, true));
}

#[tokio::test]
async fn command_that_ignores_sigterm_is_killed_after_its_time_limit() {
    let agent = Agent::start().await;
    let script = "trap '' TERM; while :; do sleep 0.01; done";
    let request = ExecRequest { timeout_ms: Some(20), ..crate::agent::shell(script) };

    let ran = agent.run_request(request).await.unwrap();

    assert_eq!((ran.code, ran.timed_out), (137, true));
}

/// Commands that leave a process which survives their `SIGTERM`: one process ignores the signal,
/// the other is in another session. Each command prints the process id.
const STUBBORN: [&str; 2] =
    ["(trap '' TERM; exec sleep 311) & echo $!; wait", "setsid sleep 311 & echo $!; wait"];

#[tokio::test]
async fn time_limit_kills_every_process_of_the_command() {
    let agent = Agent::start().await;
    for script in STUBBORN {
        let request = ExecRequest { timeout_ms: Some(100), ..crate::agent::shell(script) };

        let ran = agent.run_request(request).await.unwrap();

        assert_eq!((ran.code, ran.timed_out), (143, true), "{script}");
        gone(ran.stdout().trim()).await;
    }
}

#[tokio::test]
async fn time_limit_of_a_job_kills_every_process_of_it() {
    let agent = Agent::start().await;
    for script in STUBBORN {
        let request = ExecRequest { timeout_ms: Some(100), ..crate::agent::shell(script) };

        let ran = agent.run_job(request).await;

        assert_eq!(ran.code, 143, "{script}");
        gone(ran.stdout().trim()).await;
    }
}

#[tokio::test]
async fn killed_job_leaves_no_process_behind() {
    let agent = Agent::start().await;
    for script in STUBBORN {
        let pid_file = agent.path("pid");
        let script = script.replace("echo $!", "echo $! >pid.new; mv pid.new pid");
        let job = agent.client.create_detached(crate::agent::shell(&script)).await.unwrap();
        crate::agent::until("the job runs", || std::fs::exists(&pid_file).unwrap()).await;
        let pid = std::fs::read_to_string(&pid_file).unwrap();

        agent.client.kill_session(&job.session_id).await.unwrap();

        gone(pid.trim()).await;
        std::fs::remove_file(&pid_file).unwrap();
    }
}

#[tokio::test]
async fn signal_bypasses_unread_input() {
    let agent = Agent::start().await;
    let (mut input, output) = agent.start_command(&["sleep", "1000"]).await;
    // More than the queue and all buffers hold: the connection is stuck.
    let flooded = timeout(Duration::from_millis(200), input.write(&vec![0; 16 << 20])).await;
    assert!(flooded.is_err());

    input.signal(9).await.unwrap();

    assert_eq!(collect(output).await.unwrap().code, 137);
}

#[tokio::test]
async fn command_that_reads_nothing_dies_with_its_client() {
    let agent = Agent::start().await;
    let (mut input, mut output) =
        agent.start_command(&["sh", "-c", "echo $$; exec sleep 1000"]).await;
    let ExecEvent::Stdout(pid) = output.next().await.unwrap() else { panic!("no pid") };
    drop(timeout(Duration::from_millis(200), input.write(&vec![0; 16 << 20])).await);

    drop((input, output));

    gone(std::str::from_utf8(&pid).unwrap()).await;
}

#[tokio::test]
async fn unknown_user_and_missing_rights_are_reported() {
    let agent = Agent::start().await;
    let request = |user: &str| ExecRequest {
        user: Some(user.to_owned()),
        ..crate::agent::command(&["id", "-u"])
    };

    let error = agent.run_request(request("no-such-user")).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Agent(agent) if agent.kind == ErrorKind::NoSuchUser),
        "{error}"
    );
    let root = agent.run_request(request("root")).await;
    match root {
        Ok(ran) => assert_eq!(ran.stdout(), "0\n"),
        Err(error) => {
            assert!(
                matches!(&error, CallError::Agent(agent) if agent.kind == ErrorKind::PermissionDenied),
                "{error}"
            );
        }
    }
}
