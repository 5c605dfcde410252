//! Sessions: terminals and jobs that survive their client.

use std::time::Duration;

use bhatti_agent::{CallError, ExecEvent, ExecInput, SessionOutput};
use bhatti_proto::{ErrorKind, ExecRequest, FrameType, GuestConfig, SessionInfo};
use proptest::prelude::*;
use tokio::time::timeout;

use crate::agent::{Agent, LIMIT, command, gone, shell, until};

fn terminal(script: &str) -> ExecRequest {
    ExecRequest { tty: Some(true), ..shell(script) }
}

/// Reads until the text so far contains `wanted`.
async fn read_until(output: &mut SessionOutput, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        match timeout(LIMIT, output.next()).await.expect("output arrives").unwrap() {
            ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => {
                text.push_str(&String::from_utf8_lossy(&bytes));
            }
            other => panic!("{other:?} instead of {wanted:?} after {text:?}"),
        }
    }
    text
}

/// Reads to the exit, and returns output and code.
async fn read_to_exit(output: &mut SessionOutput) -> (Vec<u8>, i32) {
    let mut all = Vec::new();
    loop {
        match timeout(LIMIT, output.next()).await.expect("the session ends").unwrap() {
            ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => all.extend_from_slice(&bytes),
            ExecEvent::Exit(code) => return (all, code),
            ExecEvent::TimedOut => {}
        }
    }
}

async fn list_one(agent: &Agent) -> SessionInfo {
    let sessions = agent.client.list_sessions().await.unwrap();
    assert_eq!(sessions.len(), 1, "{sessions:?}");
    sessions.into_iter().next().unwrap()
}

/// Waits until the only session matches `wanted`.
async fn session_is(agent: &Agent, wanted: impl Fn(&SessionInfo) -> bool) {
    let waiting = async {
        while !wanted(&list_one(agent).await) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LIMIT, waiting).await.unwrap();
}

fn is_no_such_session(error: &CallError) -> bool {
    matches!(error, CallError::Agent(agent) if agent.kind == ErrorKind::NoSuchSession)
}

#[tokio::test]
async fn terminal_relays_and_ends_with_its_process() {
    let agent = Agent::start().await;
    let request = ExecRequest { tty: Some(true), ..command(&["sh"]) };
    let (info, mut input, mut output) = agent.client.create_session(request).await.unwrap();
    assert_eq!(
        (&*info.session_id, info.tty, info.running, info.attached),
        ("s1", true, true, true)
    );

    input.write(b"stty -echo; echo sum $((40+2)); tty\n").await.unwrap();
    let text = read_until(&mut output, "/dev/pts/").await;
    assert!(text.contains("sum 42"), "{text}");

    input.write(b"exit 7\n").await.unwrap();
    assert_eq!(read_to_exit(&mut output).await.1, 7);
}

#[tokio::test]
async fn terminal_belongs_to_its_user() {
    if !bhatti_testkit::is_root() {
        bhatti_testkit::skip("terminals of other users", "only root may give a terminal away");
        return;
    }
    let agent = Agent::start().await;
    let script = "exec 3<>$(tty) && stat -Lc 'owner %u %g' /proc/self/fd/3; cd /";
    let request = ExecRequest { user: Some("1234".into()), ..terminal(script) };

    let (_info, _input, mut output) = agent.client.create_session(request).await.unwrap();

    read_until(&mut output, "owner 1234 5").await;
}

/// Starts a job that ends with code 42 on SIGINT and ignores SIGTERM, and waits until it is set up.
async fn start_job_that_ends_on_sigint(agent: &Agent) -> SessionOutput {
    let script = "trap '' TERM; trap 'exit 42' INT; echo ready; while :; do sleep 0.01; done";
    let request = ExecRequest { stop_signal: Some(2), ..shell(script) };
    let job = agent.client.create_detached(request).await.unwrap();
    let (_info, _input, mut output) = agent.client.observe(&job.session_id, Some(0)).await.unwrap();
    read_until(&mut output, "ready").await;
    output
}

#[tokio::test]
async fn stopped_job_gets_its_own_stop_signal() {
    let agent = Agent::start().await;
    let mut output = start_job_that_ends_on_sigint(&agent).await;

    agent.client.stop_session("s1", LIMIT).await.unwrap();

    assert_eq!(read_to_exit(&mut output).await.1, 42);
}

#[tokio::test]
async fn stopped_job_that_goes_on_is_killed_with_its_children() {
    let agent = Agent::start().await;
    let script = "trap '' TERM; (while :; do sleep 0.01; done) & echo $!; while :; do wait; done";
    let job = agent.client.create_detached(shell(script)).await.unwrap();
    let (_info, _input, mut output) = agent.client.observe(&job.session_id, Some(0)).await.unwrap();
    let child = read_until(&mut output, "\n").await;

    agent.client.stop_session("s1", Duration::from_millis(50)).await.unwrap();

    assert_eq!(read_to_exit(&mut output).await.1, 128 + 9);
    gone(&child).await;
}

#[tokio::test]
async fn earliest_kill_of_a_stopped_job_stays() {
    let agent = Agent::start().await;
    let script = "trap '' TERM; echo ready; while :; do sleep 0.01; done";
    agent.client.create_detached(shell(script)).await.unwrap();
    let (_info, _input, mut output) = agent.client.observe("s1", Some(0)).await.unwrap();
    read_until(&mut output, "ready").await;

    for grace in [10 * LIMIT, Duration::from_millis(50), 10 * LIMIT] {
        agent.client.stop_session("s1", grace).await.unwrap();
    }

    assert_eq!(read_to_exit(&mut output).await.1, 128 + 9);
}

#[tokio::test]
async fn children_of_a_stopped_job_are_killed_soon_after_it_has_ended() {
    let agent = Agent::start().await;
    let script = "(trap '' TERM; while :; do sleep 0.01; done) & echo $!; wait";
    agent.client.create_detached(shell(script)).await.unwrap();
    let (_info, _input, mut output) = agent.client.observe("s1", Some(0)).await.unwrap();
    let child = read_until(&mut output, "\n").await;

    agent.client.stop_session("s1", 10 * LIMIT).await.unwrap();

    assert_eq!(read_to_exit(&mut output).await.1, 128 + 15);
    gone(&child).await;
}

#[tokio::test]
async fn stop_of_an_unknown_session_is_refused() {
    let agent = Agent::start().await;

    let refused = agent.client.stop_session("s9", LIMIT).await.unwrap_err();

    assert!(is_no_such_session(&refused), "{refused:?}");
}

#[tokio::test]
async fn sessions_with_long_commands_are_listed() {
    let agent = Agent::start().await;
    let long = ": \u{1}\u{1}".repeat(20_000);
    for _ in 0..60 {
        agent.client.create_detached(shell(&long)).await.unwrap();
    }

    let sessions = agent.client.list_sessions().await.unwrap();

    assert_eq!(sessions.len(), 60);
    for SessionInfo { argv, .. } in sessions {
        assert!(argv.len() < 1100 && argv.starts_with("sh -c : \u{1}") && argv.ends_with('…'));
    }
}

#[tokio::test]
async fn terminal_has_the_requested_size() {
    let agent = Agent::start().await;
    let request = ExecRequest {
        rows: Some(50),
        cols: Some(132),
        ..terminal("stty size; read go; stty size")
    };
    let (_info, mut input, mut output) = agent.client.create_session(request).await.unwrap();
    read_until(&mut output, "50 132").await;

    input.resize(40, 120).await.unwrap();
    input.write(b"go\n").await.unwrap();

    read_until(&mut output, "40 120").await;
}

#[tokio::test]
async fn session_survives_its_client_and_replays_its_output() {
    let agent = Agent::start().await;
    let (info, input, mut output) = agent
        .client
        .create_session(terminal("echo first; read go; echo second; read stop"))
        .await
        .unwrap();
    read_until(&mut output, "first").await;
    drop((input, output));
    session_is(&agent, |session| !session.attached && session.running).await;

    let (info, mut input, mut output) = agent.client.attach(&info.session_id, None).await.unwrap();
    assert!(info.attached);
    input.write(b"go\n").await.unwrap();

    let text = read_until(&mut output, "second").await;
    assert!(text.contains("first"), "{text}");
}

#[tokio::test]
async fn second_client_displaces_the_first_and_keeps_the_session() {
    let agent = Agent::start().await;
    let (info, first_input, mut first) = agent
        .client
        .create_session(ExecRequest { max_idle_sec: Some(1), ..terminal("cat") })
        .await
        .unwrap();
    let (_, mut input, mut second) = agent.client.attach(&info.session_id, None).await.unwrap();

    assert_eq!(read_to_exit(&mut first).await.1, 0);
    drop((first_input, first));
    // Once a new connection was served, the agent has handled the end of the first client.
    assert!(list_one(&agent).await.attached);
    input.write(b"still here\n").await.unwrap();
    read_until(&mut second, "still here").await;
    // That end starts no idle timer, either.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(list_one(&agent).await.running);
}

#[tokio::test]
async fn kill_of_a_terminal_is_answered_by_its_exit() {
    let agent = Agent::start().await;
    let (_info, mut input, mut output) =
        agent.client.create_session(terminal("echo up; exec sleep 1000")).await.unwrap();
    read_until(&mut output, "up").await;

    input.kill().await.unwrap();

    assert_eq!(read_to_exit(&mut output).await.1, 143);
    assert!(agent.client.list_sessions().await.unwrap().is_empty());
}

#[tokio::test]
async fn kill_reaches_the_client_and_unknown_sessions_are_refused() {
    let agent = Agent::start().await;
    let (info, _input, mut output) =
        agent.client.create_session(terminal("exec sleep 1000")).await.unwrap();

    agent.client.kill_session(&info.session_id).await.unwrap();

    assert_eq!(read_to_exit(&mut output).await.1, 137);
    assert!(is_no_such_session(&agent.client.kill_session("s99").await.unwrap_err()));
    assert!(is_no_such_session(&agent.client.attach("s99", None).await.err().unwrap()));
}

#[tokio::test]
async fn idle_session_is_killed_and_an_attached_one_is_not() {
    let agent = Agent::start().await;
    let request = ExecRequest { max_idle_sec: Some(1), ..terminal("echo $$; exec sleep 1000") };
    let (info, input, mut output) = agent.client.create_session(request).await.unwrap();
    let pid = read_until(&mut output, "\n").await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(list_one(&agent).await.running);

    drop((input, output));

    gone(&pid).await;
    session_is(&agent, |session| session.exit_code == Some(137)).await;
    let (_, _input, mut output) = agent.client.attach(&info.session_id, None).await.unwrap();
    assert_eq!(read_to_exit(&mut output).await.1, 137);
}

#[tokio::test]
async fn ended_session_keeps_its_exit_code() {
    let agent = Agent::start().await;
    agent.client.create_detached(terminal("exit 5")).await.unwrap();

    session_is(&agent, |session| session.exit_code == Some(5)).await;
}

#[tokio::test]
async fn ended_session_is_removed_after_its_retention_time() {
    let agent = Agent::start_with(r#"{"finished_session_ms": 50, "finished_job_ms": 50}"#).await;
    agent.client.create_detached(terminal("exit 5")).await.unwrap();
    agent.client.create_detached(shell("exit 5")).await.unwrap();

    until_async(|| async { agent.client.list_sessions().await.unwrap().is_empty() }).await;
}

async fn until_async<F: Future<Output = bool>>(mut holds: impl FnMut() -> F) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, waiting).await.unwrap();
}

#[tokio::test]
async fn session_is_removed_once_its_exit_is_collected() {
    let agent = Agent::start().await;
    let (info, input, output) = agent.client.create_session(terminal("exit 3")).await.unwrap();
    drop((input, output));
    // The first client may have collected the exit already.
    match agent.client.attach(&info.session_id, None).await {
        Ok((_, _input, mut output)) => assert_eq!(read_to_exit(&mut output).await.1, 3),
        Err(error) => assert!(is_no_such_session(&error)),
    }

    until_async(|| async {
        matches!(agent.client.attach(&info.session_id, None).await, Err(error) if is_no_such_session(&error))
    })
    .await;
}

#[tokio::test]
async fn scrollback_is_the_last_64_kib() {
    let agent = Agent::start().await;
    let script = "stty -opost; seq 10000 25000; printf END; read x";
    let (info, input, mut output) = agent.client.create_session(terminal(script)).await.unwrap();
    read_until(&mut output, "END").await;
    drop((input, output));

    // Hosts of the original system get the scrollback as one frame.
    let mut raw = agent.raw().await;
    raw.send(FrameType::EXEC_REQ, &format!(r#"{{"argv":[],"session_id":"{}"}}"#, info.session_id))
        .await;
    assert_eq!(raw.next().await.unwrap().frame_type, FrameType::SESSION_INFO);
    let (frame_type, scrollback) = raw.text().await;

    assert_eq!((frame_type, scrollback.len()), (FrameType::STDOUT, 65_536));
    assert!(scrollback.ends_with("25000\nEND") && !scrollback.contains("10000\n"));
}

#[tokio::test]
async fn producer_at_full_speed_is_followed_without_gap_or_repetition() {
    let agent = Agent::start().await;
    let script = "stty -opost; exec seq 1 400000";
    let (_info, _input, mut output) = agent.client.create_session(terminal(script)).await.unwrap();

    let (all, code) = read_to_exit(&mut output).await;

    let expected: String = (1..=400_000).map(|number| format!("{number}\n")).collect();
    assert_eq!(code, 0);
    assert!(String::from_utf8(all).unwrap() == expected);
}

#[tokio::test]
async fn every_reattach_to_a_busy_terminal_sees_an_unbroken_sequence() {
    let agent = Agent::start().await;
    let script = "stty -opost; i=0; while :; do i=$((i+1)); echo $i; done";
    let (info, input, output) = agent.client.create_session(terminal(script)).await.unwrap();
    drop((input, output));

    for _ in 0..60 {
        let (_, _input, mut output) = agent.client.attach(&info.session_id, None).await.unwrap();
        let mut text = String::new();
        for _ in 0..4 {
            let ExecEvent::Stdout(bytes) = timeout(LIMIT, output.next()).await.unwrap().unwrap()
            else {
                panic!()
            };
            text.push_str(std::str::from_utf8(&bytes).unwrap());
        }
        let lines: Vec<&str> = text.split('\n').collect();
        // The first and the last line may be parts of lines.
        let numbers: Vec<u64> =
            lines[1..lines.len() - 1].iter().map(|line| line.parse().unwrap()).collect();
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "a gap or a repetition");
    }
    agent.client.kill_session(&info.session_id).await.unwrap();
}

#[tokio::test]
async fn job_runs_without_a_client_and_keeps_both_streams_and_its_code() {
    let agent = Agent::start().await;
    let job =
        agent.client.create_detached(shell("echo out; echo err >&2; cat; exit 9")).await.unwrap();
    assert!(!job.tty && !job.attached);
    session_is(&agent, |session| session.exit_code == Some(9)).await;

    for _ in 0..2 {
        let (_, _input, mut output) = agent.client.attach(&job.session_id, None).await.unwrap();
        // The order of the two pipes is not defined.
        let mut events = [output.next().await.unwrap(), output.next().await.unwrap()];
        events.sort_by_key(|event| matches!(event, ExecEvent::Stderr(_)));
        assert_eq!(events, [ExecEvent::Stdout("out\n".into()), ExecEvent::Stderr("err\n".into())]);
        assert_eq!(output.next().await.unwrap(), ExecEvent::Exit(9));
    }
    agent.client.kill_session(&job.session_id).await.unwrap();
    assert!(agent.client.list_sessions().await.unwrap().is_empty());
}

#[tokio::test]
async fn client_of_a_job_reattaches_without_losing_or_repeating_a_byte() {
    let agent = Agent::start().await;
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    let job = agent.client.create_detached(command(&["seq", "1", "200000"])).await.unwrap();

    let (mut all, mut position, mut cuts) = (Vec::new(), 0, 0);
    let code = 'reading: loop {
        let (_, _input, mut output) =
            agent.client.attach(&job.session_id, Some(position)).await.unwrap();
        for _ in 0..=cuts % 5 {
            match timeout(LIMIT, output.next()).await.unwrap().unwrap() {
                ExecEvent::Stdout(bytes) => all.extend_from_slice(&bytes),
                ExecEvent::Exit(code) => break 'reading code,
                other => panic!("{other:?}"),
            }
            position = output.position();
        }
        cuts += 1;
    };

    assert_eq!(code, 0);
    assert!(cuts > 5, "{cuts} cuts");
    assert!(String::from_utf8(all).unwrap() == expected);
}

#[tokio::test]
async fn observers_follow_a_job_beside_its_client() {
    let agent = Agent::start().await;
    let (job, mut input, mut attached) =
        agent.client.create_session(command(&["cat"])).await.unwrap();
    let (_, _first, mut observed) = agent.client.observe(&job.session_id, None).await.unwrap();
    let (_, _second, mut late) = agent.client.observe(&job.session_id, Some(2)).await.unwrap();

    input.write(b"hello").await.unwrap();
    input.end().await.unwrap();

    assert_eq!(read_to_exit(&mut attached).await.0, b"hello");
    assert_eq!(read_to_exit(&mut observed).await, (b"hello".to_vec(), 0));
    // The job had no output when this observer came, so offset 2 was clamped to 0.
    assert_eq!(read_to_exit(&mut late).await, (b"hello".to_vec(), 0));
    let (_, _third, mut part) = agent.client.observe(&job.session_id, Some(2)).await.unwrap();
    assert_eq!(read_to_exit(&mut part).await, (b"llo".to_vec(), 0));
}

#[tokio::test]
async fn slow_observer_gets_an_error_at_lost_output() {
    let agent = Agent::start().await;
    let script = "read go; head -c 50000000 /dev/zero; echo end";
    let request = ExecRequest { output_limit: Some(64 * 1024), ..shell(script) };
    let (job, mut input, attached) = agent.client.create_session(request).await.unwrap();
    let (_, _observer, mut observed) = agent.client.observe(&job.session_id, None).await.unwrap();
    input.write(b"go\n").await.unwrap();
    // An attached client would hold the job back. An observer does not.
    drop((input, attached));
    session_is(&agent, |session| !session.running).await;

    let outcome = loop {
        match timeout(LIMIT, observed.next()).await.unwrap() {
            Ok(ExecEvent::Stdout(bytes)) => assert!(bytes.iter().all(|byte| *byte == 0)),
            other => break other,
        }
    };

    assert!(
        matches!(&outcome, Err(CallError::Agent(refused)) if refused.kind == ErrorKind::Limit),
        "{outcome:?}"
    );
    let (_, _observer, mut late) =
        agent.client.observe(&job.session_id, Some(u64::MAX)).await.unwrap();
    assert_eq!(late.next().await.unwrap(), ExecEvent::Exit(0));
}

#[tokio::test]
async fn job_output_is_capped_and_its_start_is_reported() {
    let agent = Agent::start().await;
    let request = ExecRequest { output_limit: Some(64 * 1024), ..command(&["seq", "1", "100000"]) };
    let job = agent.client.create_detached(request).await.unwrap();
    session_is(&agent, |session| !session.running).await;

    let (info, _input, mut output) = agent.client.attach(&job.session_id, Some(0)).await.unwrap();
    let (kept, _) = read_to_exit(&mut output).await;

    let (start, end) = (info.output_start.unwrap(), info.output_end.unwrap());
    assert_eq!(end, 588_895);
    assert!((32 * 1024..=64 * 1024).contains(&(end - start)), "{start}..{end}");
    assert_eq!(kept.len() as u64, end - start);
    assert!(kept.ends_with(b"\n99999\n100000\n"));
}

#[tokio::test]
async fn attached_job_receives_input_and_eof() {
    let agent = Agent::start().await;
    let (_info, mut input, mut output) =
        agent.client.create_session(command(&["tr", "a-z", "A-Z"])).await.unwrap();

    input.write(b"hello").await.unwrap();
    input.end().await.unwrap();

    assert_eq!(read_to_exit(&mut output).await, (b"HELLO".to_vec(), 0));
}

#[tokio::test]
async fn activity_counts_running_and_attached_sessions() {
    let agent = Agent::start().await;
    assert_eq!(agent.client.activity().await.unwrap().last_activity_unix, 0);
    let (_info, input, output) = agent.client.create_session(terminal("cat")).await.unwrap();
    agent.client.create_detached(command(&["sleep", "1000"])).await.unwrap();
    let running = agent.start_command(&["sleep", "1000"]).await;

    let activity = agent.client.activity().await.unwrap();
    assert!(activity.last_activity_unix > 1_700_000_000);
    assert_eq!((activity.active_sessions, activity.attached_sessions), (2, 1));
    until_async(|| async { agent.client.activity().await.unwrap().running_jobs == 2 }).await;

    drop((input, output, running));
    until_async(|| async {
        let activity = agent.client.activity().await.unwrap();
        (activity.attached_sessions, activity.running_jobs) == (0, 1)
    })
    .await;
    agent.client.kill_session("s2").await.unwrap();
    agent.client.kill_session("s1").await.unwrap();
    until("sessions end", || true).await;
}

/// An operation of a client on sessions.
#[derive(Clone, Debug)]
enum Step {
    Create,
    CreateDetached,
    Attach(usize),
    Detach(usize),
    Kill(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        Just(Step::Create),
        Just(Step::CreateDetached),
        (0usize..6).prop_map(Step::Attach),
        (0usize..6).prop_map(Step::Detach),
        (0usize..6).prop_map(Step::Kill),
    ];
    prop::collection::vec(step, 1..14)
}

/// The expected sessions.
#[derive(Default)]
struct Model {
    /// In creation order: the id, and the attached client.
    sessions: Vec<(String, Option<(ExecInput, SessionOutput)>)>,
}

async fn run_steps(steps: Vec<Step>) {
    let agent = Agent::start().await;
    let mut model = Model::default();
    for step in steps {
        let count = model.sessions.len();
        match step {
            Step::Create => {
                let (info, input, output) =
                    agent.client.create_session(terminal("exec sleep 1000")).await.unwrap();
                model.sessions.push((info.session_id, Some((input, output))));
            }
            Step::CreateDetached => {
                let info = agent.client.create_detached(terminal("exec sleep 1000")).await.unwrap();
                model.sessions.push((info.session_id, None));
            }
            Step::Attach(index) if index < count => {
                let (_, input, output) =
                    agent.client.attach(&model.sessions[index].0, None).await.unwrap();
                // Drop the displaced client last.
                let displaced = model.sessions[index].1.replace((input, output));
                drop(displaced);
            }
            Step::Detach(index) if index < count => drop(model.sessions[index].1.take()),
            Step::Kill(index) if index < count => {
                let (id, client) = model.sessions.remove(index);
                agent.client.kill_session(&id).await.unwrap();
                let (_input, mut output) = match client {
                    Some(client) => client,
                    None => {
                        let (_, input, output) = agent.client.attach(&id, None).await.unwrap();
                        (input, output)
                    }
                };
                assert_eq!(read_to_exit(&mut output).await.1, 137);
            }
            Step::Attach(_) | Step::Detach(_) | Step::Kill(_) => {}
        }
        let wanted: Vec<(String, bool, bool)> = model
            .sessions
            .iter()
            .map(|(id, client)| (id.clone(), true, client.is_some()))
            .collect();
        until_async(|| async {
            let listed = agent.client.list_sessions().await.unwrap().into_iter();
            listed.map(|info| (info.session_id, info.running, info.attached)).collect::<Vec<_>>()
                == wanted
        })
        .await;
    }
    for (id, _) in &model.sessions {
        agent.client.kill_session(id).await.unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn registry_matches_the_operations_of_its_clients(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run_steps(steps));
    }
}

#[tokio::test]
async fn restarting_job_starts_at_each_boot_until_it_has_ended() {
    let agent = Agent::start().await;
    let (runs, pids) = (agent.path("runs"), agent.path("pids"));
    let script = format!("echo $V $PWD >>{runs}; echo $$ >>{pids}; exec sleep 1000");
    let service = ExecRequest {
        restart: true,
        env: [("V".to_owned(), "value".to_owned())].into(),
        cwd: Some("/".to_owned()),
        ..command(&["sh", "-c", &script])
    };
    agent.client.create_detached(command(&["true"])).await.unwrap();
    let begun = agent.client.create_detached(service).await.unwrap();
    assert_eq!((begun.session_id.as_str(), begun.restart), ("s2", true));
    let lines = |path: &str| std::fs::read_to_string(path).unwrap_or_default().lines().count();
    until("the job runs", || lines(&pids) == 1).await;

    let agent = agent.start_anew().await;
    // The processes of a machine end with it.
    bhatti_testkit::kill_process(std::fs::read_to_string(&pids).unwrap().trim().parse().unwrap());
    assert!(
        agent.client.list_sessions().await.unwrap().is_empty(),
        "the guest is not configured yet"
    );
    agent.client.configure(&GuestConfig::default()).await.unwrap();
    until("the job runs again", || lines(&pids) == 2).await;
    assert_eq!(std::fs::read_to_string(&runs).unwrap(), "value /\nvalue /\n");
    let listed = agent.client.list_sessions().await.unwrap();
    assert_eq!((listed.len(), listed[0].session_id.as_str(), listed[0].restart), (1, "s2", true));
    let next = agent.client.create_detached(command(&["true"])).await.unwrap();
    assert_eq!(next.session_id, "s3");

    agent.client.kill_session("s2").await.unwrap();
    let kept = agent.directory.path().join("state/restart/s2.json");
    until("the file of the job is removed", || !kept.exists()).await;
    let agent = agent.start_anew().await;
    agent.client.configure(&GuestConfig::default()).await.unwrap();
    assert!(agent.client.list_sessions().await.unwrap().is_empty());
}

#[tokio::test]
async fn invalid_restarting_jobs_are_refused_and_leave_no_file() {
    let agent = Agent::start().await;
    let restarting = |argv: &[&str]| ExecRequest { restart: true, ..command(argv) };

    let attached = agent.client.create_session(restarting(&["true"])).await;
    assert!(attached.err().unwrap().to_string().contains("only a detached job"));
    let missing = agent.client.create_detached(restarting(&["no-such-program"])).await;
    missing.unwrap_err();
    let directory = agent.directory.path().join("state/restart");
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
    for number in 0..64 {
        std::fs::write(directory.join(format!("s{}.json", 1000 + number)), "no request").unwrap();
    }
    let beyond = agent.client.create_detached(restarting(&["sleep", "1000"])).await;
    assert!(beyond.unwrap_err().to_string().contains("64 jobs start again already"));
    // Files that are not requests are left alone.
    let agent = agent.start_anew().await;
    agent.client.configure(&GuestConfig::default()).await.unwrap();
    assert!(agent.client.list_sessions().await.unwrap().is_empty());
}
