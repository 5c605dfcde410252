//! Replies of the original system, as observed.

use std::fs;

use bhatti_proto::{FrameType, SessionInfo};

use crate::agent::Agent;

/// Returns the replies to one request, until the end of the connection.
async fn replies(agent: &Agent, frame_type: FrameType, payload: &str) -> Vec<(FrameType, String)> {
    let mut raw = agent.raw().await;
    raw.send(frame_type, payload).await;
    let mut replies = Vec::new();
    while let Some(frame) = raw.next().await {
        replies.push((frame.frame_type, String::from_utf8_lossy(&frame.payload).into_owned()));
    }
    replies
}

fn error(text: &str) -> Vec<(FrameType, String)> {
    vec![(FrameType::ERROR, text.to_owned())]
}

const EXIT_0: &str = "\0\0\0\0";

type Case = (FrameType, String, Vec<(FrameType, String)>);

/// Returns requests and the original's replies; `file` holds `a\nb`.
fn observed(file: &str) -> Vec<Case> {
    let exit = |code: &str| (FrameType::EXIT, code.to_owned());
    let out = |text: &str| (FrameType::STDOUT, text.to_owned());
    vec![
        (FrameType::EXEC_REQ, r#"{"argv":[]}"#.to_owned(), error("empty argv")),
        (FrameType(0x99), String::new(), error("unexpected frame type 0x99")),
        (
            FrameType::EXEC_REQ,
            r#"{"argv":["nope-zz"]}"#.to_owned(),
            error(r#"start: exec: "nope-zz": executable file not found in $PATH"#),
        ),
        (
            FrameType::EXEC_REQ,
            r#"{"argv":["echo","hi"]}"#.to_owned(),
            vec![out("hi\n"), exit(EXIT_0)],
        ),
        (
            FrameType::EXEC_REQ,
            r#"{"argv":[],"session_id":"x"}"#.to_owned(),
            error("session not found"),
        ),
        (FrameType::EXEC_KILL, r#"{"session_id":"x"}"#.to_owned(), error("session not found")),
        (FrameType::EXEC_KILL, "{".to_owned(), error("bad kill request")),
        (
            FrameType::EXEC_LIST_REQ,
            String::new(),
            vec![(FrameType::EXEC_LIST_RESP, "[]".to_owned())],
        ),
        (
            FrameType::ACTIVITY_REQ,
            String::new(),
            vec![(
                FrameType::ACTIVITY_RESP,
                r#"{"last_activity_unix":0,"active_sessions":0,"attached_sessions":0}"#.to_owned(),
            )],
        ),
        (
            FrameType::FILE_READ_REQ,
            r#"{"path":"/nope/x"}"#.to_owned(),
            error("open /nope/x: no such file or directory"),
        ),
        (FrameType::FILE_READ_REQ, r#"{"path":"/tmp"}"#.to_owned(), error("/tmp is a directory")),
        (
            FrameType::FILE_READ_REQ,
            r#"{"path":"/dev/null"}"#.to_owned(),
            error("/dev/null is not a regular file"),
        ),
        (
            FrameType::FILE_STAT_REQ,
            r#"{"path":"/nope"}"#.to_owned(),
            error("stat /nope: no such file or directory"),
        ),
        (
            FrameType::FILE_LS_REQ,
            r#"{"path":"/etc/passwd"}"#.to_owned(),
            error("/etc/passwd is not a directory"),
        ),
        (
            FrameType::FILE_LS_REQ,
            r#"{"path":"/nope"}"#.to_owned(),
            error("stat /nope: no such file or directory"),
        ),
        (
            FrameType::FILE_WRITE_REQ,
            r#"{"path":"/tmp/x","mode":"0644","size":-1}"#.to_owned(),
            error("file size must be >= 0"),
        ),
        (
            FrameType::FILE_READ_REQ,
            format!(r#"{{"path":"{file}","offset":-5,"limit":-1,"max_bytes":-1}}"#),
            vec![
                (FrameType::FILE_READ_RESP, r#"{"mode":"0644","size":3}"#.to_owned()),
                out("a\nb"),
                exit(EXIT_0),
            ],
        ),
    ]
}

#[tokio::test]
async fn replies_match_those_of_the_original() {
    let agent = Agent::start().await;
    let file = agent.path("file");
    fs::write(&file, "a\nb").unwrap();
    let cases = observed(&file);

    for (frame_type, payload, expected) in cases {
        // The first request that counts as activity changes the answers to later ones.
        let fresh = Agent::start().await;
        let agent = if frame_type == FrameType::ACTIVITY_REQ { &fresh } else { &agent };
        assert_eq!(replies(agent, frame_type, &payload).await, expected, "{frame_type} {payload}");
    }
    let broken = replies(&agent, FrameType::EXEC_REQ, "{").await;
    assert!(broken[0].1.starts_with("bad exec request: "), "{broken:?}");
}

#[tokio::test]
async fn terminal_session_matches_the_original() {
    let agent = Agent::start().await;
    let mut first = agent.raw().await;
    first.send(FrameType::EXEC_REQ, r#"{"argv":["cat"],"tty":true}"#).await;
    let (frame_type, json) = first.text().await;
    assert_eq!(frame_type, FrameType::SESSION_INFO);
    let created = r#"{"session_id":"s1","argv":"cat","tty":true,"running":true,"attached":true,"created_at":"#;
    assert!(json.starts_with(created), "{json}");

    first.send(FrameType::STDIN, "hello\n").await;
    assert!(first.text().await.1.starts_with("hello"));
    let mut second = agent.raw().await;
    second.send(FrameType::EXEC_REQ, r#"{"argv":[],"session_id":"s1"}"#).await;
    assert_eq!(second.text().await.0, FrameType::SESSION_INFO);
    assert!(second.text().await.1.starts_with("hello"));
    let mut last = first.text().await;
    while last.0 == FrameType::STDOUT {
        last = first.text().await;
    }
    assert_eq!(last, (FrameType::EXIT, EXIT_0.to_owned()));

    second.send(FrameType::KILL, "").await;
    let mut last = second.next().await.unwrap();
    while last.frame_type == FrameType::STDOUT {
        last = second.next().await.unwrap();
    }
    assert_eq!((last.frame_type, &last.payload[..]), (FrameType::EXIT, &[0, 0, 0, 0x8f][..]));
    let list: Vec<SessionInfo> =
        serde_json::from_str(&replies(&agent, FrameType::EXEC_LIST_REQ, "").await[0].1).unwrap();
    assert!(list.is_empty(), "{list:?}");
}

#[tokio::test]
async fn output_arrives_when_the_command_leaves_input_unread() {
    let agent = Agent::start().await;
    let mut raw = agent.raw().await;
    raw.send(FrameType::EXEC_REQ, r#"{"argv":["head","-n2"]}"#).await;
    raw.send(FrameType::STDIN, "one\n").await;
    raw.send(FrameType::STDIN, "two\nthree\n").await;

    let mut output = String::new();
    loop {
        match raw.text().await {
            (FrameType::STDOUT, text) => output.push_str(&text),
            (frame_type, _) => {
                assert_eq!(frame_type, FrameType::EXIT);
                break;
            }
        }
    }

    assert_eq!(output, "one\ntwo\n");
}
