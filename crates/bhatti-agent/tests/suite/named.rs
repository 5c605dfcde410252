//! Sessions that are named by process id or tag, and input beside a session's client.

use bhatti_agent::{CallError, ExecEvent, SessionOutput};
use bhatti_proto::{ErrorKind, ExecRequest, InputEnd};
use tokio::time::timeout;

use crate::agent::{Agent, LIMIT, shell};

async fn read_to_exit(output: &mut SessionOutput) -> (String, i32) {
    let mut all = String::new();
    loop {
        match timeout(LIMIT, output.next()).await.expect("the session ends").unwrap() {
            ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => {
                all.push_str(&String::from_utf8_lossy(&bytes));
            }
            ExecEvent::Exit(code) => return (all, code),
            ExecEvent::TimedOut => {}
        }
    }
}

fn kind(error: CallError) -> ErrorKind {
    match error {
        CallError::Agent(error) => error.kind,
        error => panic!("{error}"),
    }
}

#[tokio::test]
async fn input_from_other_connections_arrives_in_order_and_ends_when_one_closes_it() {
    let agent = Agent::start().await;
    let request = ExecRequest { tag: Some("reader".into()), ..shell("cat; echo end") };
    let (info, _input, mut output) = agent.client.create_session(request).await.unwrap();
    let by_pid = format!("pid:{}", info.pid.unwrap());

    for (name, text, end) in [
        (&*by_pid, "one ", InputEnd::Continue),
        ("tag:reader", "two ", InputEnd::Continue),
        ("s1", "three ", InputEnd::Close),
    ] {
        let mut input = agent.client.send_input(name, end).await.unwrap();
        input.write(text.as_bytes()).await.unwrap();
        input.finish().await.unwrap();
    }

    assert_eq!(read_to_exit(&mut output).await, ("one two three end\n".to_owned(), 0));
    // A closed input takes no more, and can be closed again.
    let refused = agent.client.send_input("s1", InputEnd::Continue).await.err().unwrap();
    assert_eq!(kind(refused), ErrorKind::BadRequest);
    let again = agent.client.send_input("s1", InputEnd::Close).await.unwrap();
    again.finish().await.unwrap();
    // A process that has ended has no process id and no tag.
    for name in [&*by_pid, "tag:reader", "pid:0", "pid:", "tag:"] {
        let refused = agent.client.observe(name, None).await.err().unwrap();
        assert_eq!(kind(refused), ErrorKind::NoSuchSession, "{name}");
    }
}

#[tokio::test]
async fn terminal_is_observed_from_its_end_beside_its_client() {
    let agent = Agent::start().await;
    let request = ExecRequest { tty: Some(true), ..shell("echo old; read line; echo new") };
    let (info, _input, mut output) = agent.client.create_session(request).await.unwrap();
    let old = timeout(LIMIT, output.next()).await.unwrap().unwrap();
    assert_eq!(old, ExecEvent::Stdout("old\r\n".into()));
    let name = format!("pid:{}", info.pid.unwrap());
    let (_, _, mut observed) = agent.client.observe(&name, Some(u64::MAX)).await.unwrap();

    let mut input = agent.client.send_input(&name, InputEnd::Continue).await.unwrap();
    input.resize(7, 70).await.unwrap();
    input.write(b"x\n").await.unwrap();
    input.finish().await.unwrap();

    assert_eq!(read_to_exit(&mut observed).await, ("x\r\nnew\r\n".to_owned(), 0));
    assert_eq!(read_to_exit(&mut output).await, ("x\r\nnew\r\n".to_owned(), 0));
}

#[tokio::test]
async fn end_by_a_signal_differs_from_an_exit_with_its_code() {
    let agent = Agent::start().await;
    for (script, signal) in [("kill -KILL $$", Some(9)), ("exit 137", None)] {
        let (_, _input, mut output) = agent.client.create_session(shell(script)).await.unwrap();

        assert_eq!(read_to_exit(&mut output).await.1, 137);
        assert_eq!(output.signal(), signal, "{script}");
    }
}

#[tokio::test]
async fn full_list_has_tags_and_notes_and_fits_in_frames() {
    let agent = Agent::start().await;
    let note = "\u{1}".repeat(4 << 10);
    for number in 0..70 {
        let request = ExecRequest {
            tag: Some(format!("tag {number}")),
            note: Some(note.clone()),
            ..shell("read line")
        };
        let (_, _input, _output) = agent.client.create_session(request).await.unwrap();
    }

    let listed = agent.client.list_sessions_in_full().await.unwrap();

    let expected = (0..70).map(|number| Some(format!("tag {number}"))).collect::<Vec<_>>();
    assert_eq!(listed.iter().map(|session| session.tag.clone()).collect::<Vec<_>>(), expected);
    assert!(listed.iter().all(|session| session.note.as_deref() == Some(note.as_str())));
    let short = agent.client.list_sessions().await.unwrap();
    assert!(short.iter().all(|session| session.tag.is_none() && session.note.is_none()));
    for request in [
        ExecRequest { tag: Some("x".repeat(257)), ..shell("true") },
        ExecRequest { note: Some("x".repeat(4097)), ..shell("true") },
    ] {
        let refused = agent.client.create_session(request).await.err().unwrap();
        assert_eq!(kind(refused), ErrorKind::BadRequest);
    }
}

#[tokio::test]
async fn client_that_loses_its_session_to_another_is_told_so() {
    let agent = Agent::start().await;
    let (_, _first, mut output) = agent.client.create_session(shell("read line")).await.unwrap();

    let (_, mut input, mut taken) = agent.client.attach("s1", None).await.unwrap();

    assert_eq!(read_to_exit(&mut output).await.1, 0);
    assert!(output.was_taken_over() && output.signal().is_none());
    input.end().await.unwrap();
    assert_eq!(read_to_exit(&mut taken).await.1, 1);
    assert!(!taken.was_taken_over());
}
