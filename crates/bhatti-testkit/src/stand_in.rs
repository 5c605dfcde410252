//! A hostile guest agent that replaces a sandbox's real one.

use std::fs;
use std::io;
use std::path::Path;

use bhatti_proto::mux::{AcceptedStream, Acceptor, read_port};
use bhatti_proto::resync::{Decoder, GENERATION, Hello};
use bhatti_proto::{FrameReader, FrameType, FrameWriter};
use bytes::BytesMut;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::compat::TokioAsyncReadCompatExt;

/// The agent channel's socket in the directory of a sandbox on QEMU.
const SOCKET: &str = "agent.sock";

/// An agent whose directory listings never end. It serves no other request. Dropping this value
/// ends it.
#[derive(Debug)]
pub struct EndlessLister(JoinHandle<()>);

impl EndlessLister {
    /// Replaces the agent of the sandbox in `directory`. The daemon reaches the new agent when it
    /// connects again.
    ///
    /// # Panics
    ///
    /// Panics if the socket cannot be replaced.
    #[must_use]
    pub fn take_over(directory: &Path) -> Self {
        let path = directory.join(SOCKET);
        fs::remove_file(&path).expect("the agent's socket is there");
        let listener = UnixListener::bind(&path).expect("the socket is free");
        Self(tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                // An error only means that the daemon has closed the connection.
                tokio::spawn(async move { drop(serve(socket).await) });
            }
        }))
    }
}

impl Drop for EndlessLister {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves one connection of the daemon.
async fn serve(socket: UnixStream) -> io::Result<()> {
    let (mut incoming, mut outgoing) = socket.into_split();
    let (mut decoder, mut plain, mut wire) = (Decoder::default(), BytesMut::new(), BytesMut::new());
    let hello = loop {
        if incoming.read_buf(&mut wire).await? == 0 {
            return Ok(());
        }
        let mut rest = &wire[..];
        let hello = decoder.decode(&mut rest, &mut plain);
        let taken = wire.len() - rest.len();
        drop(wire.split_to(taken));
        if let Some(hello) = hello {
            break hello;
        }
    };
    plain.clear();
    outgoing.write_all(&Hello { generation: GENERATION, ..hello }.encode_ack()).await?;
    let (agent, channel) = duplex(64 << 10);
    let (mut from_agent, mut to_agent) = split(channel);
    let receive = async {
        loop {
            let mut rest = &wire[..];
            // A second hello ends this connection.
            if decoder.decode(&mut rest, &mut plain).is_some() {
                return io::Result::Ok(());
            }
            wire.clear();
            to_agent.write_all(&plain.split()).await?;
            if incoming.read_buf(&mut wire).await? == 0 {
                return Ok(());
            }
        }
    };
    let send = async { tokio::io::copy(&mut from_agent, &mut outgoing).await.map(drop) };
    let accept = async {
        let mut acceptor = Acceptor::new(agent.compat());
        while let Some(stream) = acceptor.accept().await {
            tokio::spawn(async move { drop(list(stream).await) });
        }
        Ok(())
    };
    tokio::select! {
        ended = receive => ended,
        ended = send => ended,
        ended = accept => ended,
    }
}

/// Answers a request for a listing without end. Ignores other requests.
async fn list(mut stream: AcceptedStream) -> io::Result<()> {
    read_port(&mut stream).await?;
    let (reader, writer) = split(stream);
    let mut writer = FrameWriter::new(writer);
    let mut reader = FrameReader::new(reader);
    // The sandbox's token comes before the request.
    loop {
        match reader.next().await.map_err(io::Error::other)? {
            Some(frame) if frame.frame_type == FrameType::FILE_LS_REQ => break,
            Some(_) => {}
            None => return Ok(()),
        }
    }
    let entry = json!({
        "name": "n".repeat(255), "size": 0, "mode": "0777", "is_dir": false, "mtime": 0,
        "symlink_target": "t".repeat(4000),
    });
    let entries = vec![entry; 200];
    loop {
        writer.send_json(FrameType::FILE_LS_RESP, &entries).await.map_err(io::Error::other)?;
    }
}
