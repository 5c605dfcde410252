//! The agent through a hypervisor's hybrid vsock: a relay that answers as Firecracker does.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bhatti_agent::{AgentClient, CallError, ExecEvent};
use bhatti_engine::AgentChannel;
use bhatti_proto::{CONTROL_PORT, FORWARD_PORT};
use bhatti_vmm::VsockChannel;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream, copy_bidirectional};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::time::timeout;

use crate::agent::{Agent, LIMIT, collect, shell};
use crate::forward::check_directions;

const SOCKET: &str = "vsock";

/// Relays to the agent's sockets in `directory`.
fn relay(directory: &Path) {
    let listener = UnixListener::bind(directory.join(SOCKET)).unwrap();
    let directory = directory.to_owned();
    tokio::spawn(async move {
        while let Ok((host, _)) = listener.accept().await {
            let directory = directory.clone();
            tokio::spawn(async move { connect(host, &directory).await });
        }
    });
}

async fn connect(host: UnixStream, directory: &Path) -> io::Result<()> {
    let mut host = BufStream::new(host);
    let mut line = String::new();
    host.read_line(&mut line).await?;
    let ports = [
        (format!("CONNECT {CONTROL_PORT}\n"), "control"),
        (format!("CONNECT {FORWARD_PORT}\n"), "forward"),
    ];
    // A port without a listener gets no answer.
    let Some((_, name)) = ports.iter().find(|(request, _)| *request == line) else { return Ok(()) };
    let mut guest = UnixStream::connect(directory.join(name)).await?;
    host.write_all(b"OK 1073741824\n").await?;
    host.flush().await?;
    copy_bidirectional(&mut host, &mut guest).await.map(drop)
}

async fn agent_behind_vsock() -> (Agent, AgentClient) {
    let agent = Agent::start().await;
    let directory = agent.directory.path().to_owned();
    relay(&directory);
    (agent, AgentClient::new(Arc::new(VsockChannel::new(directory, SOCKET))))
}

#[tokio::test]
async fn command_takes_input_to_its_end_and_answers_through_vsock() {
    let (_agent, client) = agent_behind_vsock().await;
    let (mut input, output) = client.exec(shell("cat; echo done >&2; exit 3")).await.unwrap();
    input.write(&[0xf7; 100_000]).await.unwrap();

    input.end().await.unwrap();

    let ran = collect(output).await.unwrap();
    assert_eq!(
        (ran.stdout, ran.stderr.as_slice(), ran.code),
        (vec![0xf7; 100_000], &b"done\n"[..], 3)
    );
}

/// After a snapshot, a guest goes on without its connections.
#[tokio::test]
async fn forgotten_connections_are_lost_and_new_ones_work() {
    let agent = Agent::start().await;
    let directory = agent.directory.path().to_owned();
    relay(&directory);
    let channel = Arc::new(VsockChannel::new(directory, SOCKET));
    let client = AgentClient::new(Arc::clone(&channel) as Arc<dyn AgentChannel>);
    let (_input, mut output) = client.exec(shell("echo begun; exec sleep 1000")).await.unwrap();
    assert!(matches!(output.next().await.unwrap(), ExecEvent::Stdout(_)));

    channel.reset();

    let ended = timeout(LIMIT, output.next()).await.expect("the stream ends in time");
    assert!(matches!(ended, Err(CallError::Lost)));
    assert_eq!(client.run(shell("echo more")).await.unwrap().1, b"more\n");
}

/// Firecracker sends nothing until the guest's kernel has accepted the connection.
#[tokio::test(start_paused = true)]
async fn guest_that_accepts_no_connection_is_silent_after_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(directory.path().join(SOCKET)).unwrap();
    let channel = VsockChannel::new(directory.path().to_owned(), SOCKET);

    let opened = timeout(LIMIT, AgentClient::new(Arc::new(channel)).exec(shell("true"))).await;

    assert!(matches!(opened.unwrap().map(drop), Err(CallError::Silent { .. })));
}

#[tokio::test]
async fn command_whose_input_has_ended_can_still_be_killed() {
    let (_agent, client) = agent_behind_vsock().await;
    let (mut input, mut output) = client.exec(shell("cat; echo up; sleep 1000")).await.unwrap();
    input.end().await.unwrap();
    let up = timeout(LIMIT, output.next()).await.unwrap().unwrap();
    assert_eq!(up, ExecEvent::Stdout("up\n".into()));

    input.kill().await.unwrap();

    assert_eq!(collect(output).await.unwrap().code, 128 + 9);
}

#[tokio::test]
async fn forwarded_directions_end_independently_through_vsock() {
    let (_agent, client) = agent_behind_vsock().await;
    check_directions(&client).await;

    // The guest's direction ends first. Bytes sent afterwards still arrive.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut stream = client.forward(port).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    stream.write_all(b"later").await.unwrap();
    // Dropping the stream ends it at the server, after all written bytes.
    drop(stream);
    let mut received = String::new();
    timeout(LIMIT, server.read_to_string(&mut received)).await.unwrap().unwrap();
    assert_eq!(received, "later");
}

#[tokio::test]
async fn refusal_by_the_hypervisor_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join(SOCKET)).unwrap();
    let channel = VsockChannel::new(directory.path().to_owned(), SOCKET);
    let client = AgentClient::new(Arc::new(channel));
    for (answer, message) in [("", "nothing in the guest listens"), ("NO\n", "answered `NO`")] {
        let refuse = async {
            let (mut host, _) = listener.accept().await.unwrap();
            let mut request = String::new();
            BufStream::new(&mut host).read_line(&mut request).await.unwrap();
            host.write_all(answer.as_bytes()).await.unwrap();
        };
        let (activity, ()) = tokio::join!(client.activity(), refuse);

        let CallError::Channel(error) = activity.unwrap_err() else { panic!("no channel error") };
        assert!(error.0.to_string().contains(message), "{error:?}");
    }
}
