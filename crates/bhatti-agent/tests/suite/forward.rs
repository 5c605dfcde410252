//! TCP forwarding.

use std::time::Duration;

use bhatti_agent::{AgentClient, CallError};
use bhatti_proto::FrameType;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::agent::{Agent, LIMIT};

/// Listens on a loopback address, and returns the port. The server echoes one connection until
/// its end, and then sends `bye`.
async fn echo(address: &str) -> u16 {
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
        to.write_all(b"bye").await.unwrap();
    });
    port
}

#[tokio::test]
async fn directions_end_independently() {
    let agent = Agent::start().await;
    check_directions(&agent.client).await;
}

/// Checks both directions with servers that answer after the end of their input.
pub(crate) async fn check_directions(client: &AgentClient) {
    for address in ["127.0.0.1", "::1"] {
        let port = echo(address).await;
        let stream = client.forward(port).await.unwrap();
        let (mut from, mut to) = tokio::io::split(stream);
        let bytes: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        let sent = bytes.clone();

        let sending = tokio::spawn(async move {
            to.write_all(&sent).await.unwrap();
            to.shutdown().await.unwrap();
        });
        let mut echoed = Vec::new();
        from.read_to_end(&mut echoed).await.unwrap();

        sending.await.unwrap();
        assert!(echoed == [bytes, b"bye".to_vec()].concat(), "{address}");
    }
}

#[tokio::test]
async fn early_answer_of_an_application_arrives() {
    let agent = Agent::start().await;
    check_early_answer(&agent.client).await;
}

/// Sends far more bytes than the server reads before it answers and closes.
pub(crate) async fn check_early_answer(client: &AgentClient) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_exact(&mut [0; 1000]).await.unwrap();
        stream.write_all(b"too much").await.unwrap();
    });
    let mut stream = client.forward(port).await.unwrap();

    // The client reads only after it has sent everything.
    let sent = timeout(LIMIT, stream.write_all(&vec![0; 4 << 20])).await;
    sent.expect("the rest is accepted").unwrap();
    let mut answer = Vec::new();
    timeout(LIMIT, stream.read_to_end(&mut answer)).await.unwrap().unwrap();

    assert_eq!(answer, b"too much");
}

#[tokio::test]
async fn application_sees_the_end_of_a_vanished_client() {
    let agent = Agent::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let silent = agent.client.forward(port).await.unwrap();
    let (mut heard, _) = listener.accept().await.unwrap();
    let mut stuck = agent.client.forward(port).await.unwrap();
    let (unread, _) = listener.accept().await.unwrap();
    // Writes until all buffers on the way are full, since the application does not read.
    let flood = async { while stuck.write_all(&[0; 1 << 16]).await.is_ok() {} };
    assert!(timeout(Duration::from_millis(300), flood).await.is_err());

    drop((silent, stuck));

    let ended = timeout(LIMIT, heard.read(&mut [0])).await.expect("the server sees the end");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    let is_reset = async {
        while unread.take_error().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LIMIT, is_reset).await.expect("the server sees the end after unread bytes");
}

#[tokio::test]
async fn closed_port_is_refused_with_the_text_of_the_original() {
    let agent = Agent::start().await;

    let error = agent.client.forward(1).await.err().unwrap();

    let CallError::ForwardRefused { port: 1, message } = error else { panic!("{error}") };
    assert_eq!(message, "dial tcp 127.0.0.1:1: connect: connection refused");
}

#[tokio::test]
async fn forward_service_refuses_other_requests() {
    let agent = Agent::start().await;
    let mut raw = agent.raw_forward().await;
    raw.send(FrameType::EXEC_REQ, "{}").await;
    assert_eq!(raw.text().await, (FrameType::ERROR, "expected FWD_REQ, got 0x10".to_owned()));

    let mut raw = agent.raw_forward().await;
    raw.send(FrameType::FWD_REQ, "{").await;
    let (frame_type, json) = raw.text().await;
    assert_eq!(frame_type, FrameType::FWD_RESP);
    assert!(json.starts_with(r#"{"status":"error","message":"bad forward request: "#), "{json}");
}
