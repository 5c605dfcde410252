//! `bhatti forward`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use bhatti_client::{Client, ClientError, ForwardReceiver, ForwardSender};
use bhatti_types::Report;
use bytes::{Bytes, BytesMut};
use clap::Args;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use super::Context;
use crate::error::CliError;

/// Maximum size of one read, in bytes.
const PIECE_BYTES: usize = 64 * 1024;

/// Pause after a connection could not be accepted.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti forward dev 5432\n  bhatti forward dev 80 8080\n\nAny TCP protocol works, also in a sandbox without a network."
)]
pub(crate) struct Forward {
    /// Name or id
    sandbox: String,
    /// The port in the sandbox
    port: u16,
    /// Local port, 0 for any free one [default: the same port]
    local: Option<u16>,
    /// Local address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
}

pub(crate) async fn run(context: &Context, arguments: &Forward) -> Result<(), CliError> {
    let Forward { sandbox, port, local, address } = arguments;
    let sandbox = context.change(sandbox, async |id| context.client.inspect(id).await).await?;
    let wanted = SocketAddr::new(*address, local.unwrap_or(*port));
    let listener = TcpListener::bind(wanted).await.map_err(|error| {
        CliError::new(format!("cannot listen at {wanted}: {error}"))
            .hint(format!("choose another port: bhatti forward {} {port} 0", sandbox.name))
    })?;
    let listening = listener.local_addr()?;
    let shown = json!({ "address": listening.to_string(), "sandbox": sandbox.name, "port": port });
    context.output.show_made(&shown, (&listening.to_string(), &sandbox.name), |_| {
        format!("forwarding {listening} to port {port} of {}, until interrupted", sandbox.name)
    })?;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // A connection that broke at once, or one too many. The other connections continue.
            Err(error) => {
                context.output.note(&format!("a connection was not accepted: {error}"));
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (client, output) = (context.client.clone(), context.output);
        let (id, port) = (sandbox.id.clone(), *port);
        tokio::spawn(async move {
            if let Err(error) = connect(&client, &id, port, stream).await {
                output.note(&format!("a connection failed: {}", Report(&error)));
            }
        });
    }
}

/// Relays one connection to this machine to the sandbox's port.
async fn connect(
    client: &Client,
    sandbox: &str,
    port: u16,
    mut stream: TcpStream,
) -> Result<(), ClientError> {
    let (sender, receiver) = client.forward(sandbox, port).await?;
    let (reader, writer) = stream.split();
    // If one direction ends, the other stays open. If one breaks, both end.
    tokio::try_join!(send(reader, sender), receive(receiver, writer)).map(|_| ())
}

async fn send(mut reader: ReadHalf<'_>, mut sender: ForwardSender) -> Result<(), ClientError> {
    let mut piece = BytesMut::new();
    loop {
        piece.reserve(PIECE_BYTES);
        // A broken connection counts as ended.
        match reader.read_buf(&mut piece).await.unwrap_or_default() {
            0 => {
                sender.send(Bytes::new()).await?;
                // The sandbox's side may still send, and ends the connection at its own end.
                return Ok(());
            }
            _ => sender.send(piece.split().freeze()).await?,
        }
    }
}

async fn receive(
    mut receiver: ForwardReceiver,
    mut writer: WriteHalf<'_>,
) -> Result<(), ClientError> {
    while let Some(bytes) = receiver.next().await? {
        if writer.write_all(&bytes).await.is_err() {
            return Err(ClientError::StreamLost(None));
        }
    }
    // The local peer may be gone already.
    drop(writer.shutdown().await);
    Ok(())
}
