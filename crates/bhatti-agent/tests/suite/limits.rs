//! The limits of the agent, which keeps working after a limit was reached.

use bhatti_agent::CallError;
use bhatti_proto::{ErrorKind, ExecRequest, FileEventKind, FrameType};

use crate::agent::{Agent, LIMIT, command};

fn is_too_large(error: &CallError) -> bool {
    matches!(error, CallError::Agent(refused) if refused.kind == ErrorKind::TooLarge)
}

fn is_limit(error: &CallError) -> bool {
    matches!(error, CallError::Agent(agent) if agent.kind == ErrorKind::Limit)
}

#[tokio::test]
async fn connections_over_the_limit_are_refused_until_others_end() {
    let agent = Agent::start_with(r#"{"connections": 3}"#).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut connection = agent.raw().await;
        connection.send(FrameType::EXEC_REQ, r#"{"argv":["sleep","1000"]}"#).await;
        held.push(connection);
    }
    let mut refused = agent.raw().await;

    assert_eq!(
        refused.text().await,
        (FrameType::ERROR, "too many connections: the limit is 3".to_owned())
    );

    held.clear();
    let mut answered = false;
    for _ in 0..500 {
        answered = agent.run(&["true"]).await.is_ok();
        if answered {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(answered);
}

#[tokio::test]
async fn sessions_over_the_limit_are_refused_and_finished_ones_are_removed() {
    let agent = Agent::start_with(r#"{"sessions": 2, "finished_sessions": 2}"#).await;
    for _ in 0..2 {
        agent.client.create_detached(command(&["sleep", "1000"])).await.unwrap();
    }
    let error = agent.client.create_detached(command(&["true"])).await.unwrap_err();
    assert!(is_limit(&error), "{error}");

    for id in ["s1", "s2"] {
        agent.client.kill_session(id).await.unwrap();
    }
    let mut made = 0;
    while made < 4 {
        made += usize::from(agent.client.create_detached(command(&["true"])).await.is_ok());
    }
    assert!(agent.client.list_sessions().await.unwrap().len() <= 4);
}

#[tokio::test]
async fn terminals_over_the_limit_are_refused_and_jobs_are_not() {
    let agent = Agent::start_with(r#"{"sessions": 4, "terminals": 1}"#).await;
    let terminal = ExecRequest { tty: Some(true), ..command(&["sleep", "1000"]) };
    agent.client.create_session(terminal.clone()).await.unwrap();

    let Err(error) = agent.client.create_session(terminal).await else {
        panic!("a second terminal was created")
    };

    assert!(is_limit(&error), "{error}");
    assert!(error.to_string().contains("sessions with a terminal: the limit is 1"), "{error}");
    let job = agent.client.create_detached(command(&["sleep", "1000"])).await.unwrap();
    // The test ends by killing the agent, which the job would outlive.
    agent.client.kill_session(&job.session_id).await.unwrap();
}

#[tokio::test]
async fn watches_over_the_limit_are_refused() {
    let agent = Agent::start_with(r#"{"watches": 1}"#).await;
    let mut first = agent.client.watch("/tmp").await.unwrap();
    first.next().await.unwrap();

    let error = agent.client.watch("/tmp").await.unwrap().next().await.unwrap_err();

    assert!(is_limit(&error), "{error}");
}

#[tokio::test]
async fn file_over_the_limit_is_refused_before_its_content() {
    let agent = Agent::start_with(r#"{"file_bytes": 1000}"#).await;
    let path = agent.path("file");

    let error =
        agent.client.begin_write(&path, "", Some(1001)).await.unwrap().finish().await.unwrap_err();

    assert!(is_too_large(&error), "{error}");
    let mut unknown = agent.client.begin_write(&path, "", None).await.unwrap();
    drop(unknown.write(&[0; 1001]).await);
    let error = unknown.finish().await.unwrap_err();
    assert!(is_too_large(&error), "{error}");
    assert!(!std::fs::exists(path).unwrap());
}

#[tokio::test]
async fn silent_connection_and_stalled_write_time_out() {
    let agent = Agent::start_with(r#"{"request_ms": 50, "write_ms": 50}"#).await;
    let mut silent = agent.raw().await;
    assert_eq!(silent.text().await, (FrameType::ERROR, "no request came in time".to_owned()));

    let upload = agent.client.begin_write(&agent.path("file"), "", Some(10)).await.unwrap();
    let error = upload.finish().await.unwrap_err();
    assert!(is_limit(&error), "{error}");
    assert_eq!(std::fs::read_dir(agent.path("")).unwrap().count(), 0);
}

#[tokio::test]
async fn frame_over_the_limit_ends_only_its_connection() {
    let agent = Agent::start().await;
    let mut raw = agent.raw().await;
    raw.writer.send_raw(&[0, 0x20, 0, 0, 0x10]).await.unwrap();

    assert!(raw.next().await.is_none());
    assert_eq!(agent.run(&["true"]).await.unwrap().code, 0);
}

#[tokio::test]
async fn output_limit_of_a_job_is_capped() {
    let agent = Agent::start().await;
    let request = ExecRequest { output_limit: Some(u64::MAX), ..command(&["echo", "hi"]) };

    let (info, _input, mut output) = agent.client.create_session(request).await.unwrap();

    assert_eq!(info.output_start, Some(0));
    assert_eq!(output.next().await.unwrap(), bhatti_agent::ExecEvent::Stdout("hi\n".into()));
}

#[tokio::test]
async fn agent_refuses_to_run_if_it_is_not_pid_1() {
    let output = bhatti_host::process::command(crate::agent::lohar()).output().await.unwrap();

    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr)
            .starts_with("lohar: refusing to run: this is not PID 1")
    );
}

#[tokio::test]
async fn agent_without_free_descriptors_does_not_spin() {
    let agent = Agent::start().await;
    let pid = agent.process.id().unwrap().to_string();
    // Room for the agent's open descriptors, and for a few connections.
    let limited = bhatti_host::process::command("prlimit")
        .args(["--pid", &pid, "--nofile=40"])
        .status()
        .await;
    assert!(limited.unwrap().success());
    let spent = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let mut held = Vec::new();
    for _ in 0..80 {
        held.push(agent.raw().await);
    }

    // A second has 100 clock ticks. An agent that spins spends most of the 50 ticks here.
    let before = spent();
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert!(spent() - before < 10, "{} ticks", spent() - before);

    held.clear();
    agent.client.wait_ready(crate::agent::LIMIT).await.unwrap();
}

#[tokio::test]
async fn wait_ready_times_out_without_an_agent() {
    let agent = Agent::start().await;
    agent.client.wait_ready(crate::agent::LIMIT).await.unwrap();
    let Agent { client, mut process, .. } = agent;
    process.kill().await.unwrap();

    let error = client.wait_ready(std::time::Duration::from_millis(100)).await.unwrap_err();

    assert!(matches!(error, CallError::Channel(_)), "{error}");
}

#[tokio::test]
async fn collected_output_of_a_command_has_a_limit() {
    let agent = Agent::start().await;
    let zeros = |mib: u32| ExecRequest {
        argv: ["head", "-c", &format!("{mib}M"), "/dev/zero"].map(str::to_owned).into(),
        ..ExecRequest::default()
    };

    let (code, stdout, _) = agent.client.run(zeros(16)).await.unwrap();
    let error = agent.client.run(zeros(17)).await.unwrap_err();

    assert_eq!((code, stdout.len()), (0, 16 << 20));
    assert!(matches!(error, CallError::TooMuch { limit, .. } if limit == 16 << 20), "{error}");
}

#[tokio::test]
async fn watcher_that_reads_nothing_gets_an_overflow_event() {
    let agent = Agent::start().await;
    std::fs::create_dir(agent.path("watched")).unwrap();
    let mut events = agent.client.watch(&agent.path("watched")).await.unwrap();
    assert_eq!(events.next().await.unwrap().unwrap().kind, FileEventKind::Watching);

    // Each file causes three events. The kernel queues `max_queued_events` of them for a watcher,
    // and the connection holds some thousands more.
    let kept = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let files = kept.trim().parse::<usize>().unwrap() + 10_000;
    for number in 0..files {
        std::fs::write(agent.path(&format!("watched/{number}")), "x").unwrap();
    }
    assert!(agent.run(&["true"]).await.is_ok(), "the agent serves other requests");

    let overflow =
        async { while events.next().await.unwrap().unwrap().kind != FileEventKind::Overflow {} };
    tokio::time::timeout(LIMIT, overflow).await.unwrap();
}
