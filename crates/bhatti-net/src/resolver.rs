//! DNS: each network has a resolver at its gateway's address. It knows the network's sandboxes,
//! and forwards all other questions.
//!
//! A resolver answers every question itself, because guests believe an answer of "no such name"
//! and then ask no other resolver.

mod answer;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tracing::debug;

use crate::names::bridge_name;
use crate::{NetError, Network, Plan};
use answer::{Answer, answer, parse};

const PORT: u16 = 53;

/// Maximum size of a datagram. Local answers fit easily, and an upstream's answer carries its own
/// flag if it was truncated.
const DATAGRAM_BYTES_MAX: usize = 4096;

/// How long the list of upstreams is cached.
const SERVERS_HOLD: Duration = Duration::from_secs(5);

/// Timeout for an upstream's answer.
const UPSTREAM_LIMIT: Duration = Duration::from_secs(2);

/// Idle timeout of a client's connection.
const IDLE_LIMIT: Duration = Duration::from_secs(2);

/// Pause after a failed receive or accept, because the next one may fail at once, too.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);

/// Maximum of open questions and of connections that one network may have at once.
const OPEN_QUESTIONS: usize = 256;
const CONNECTIONS: usize = 64;
const CONNECTION_QUEUE: u32 = 64;

/// The upstream resolvers for names other than those of sandboxes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstreams {
    /// These servers.
    Fixed(Vec<IpAddr>),
    /// The servers that a file such as `/etc/resolv.conf` lists. The file is read again when the
    /// cached list is too old, because the list changes with the host's own network.
    In(PathBuf),
}

impl Upstreams {
    async fn read(&self) -> Vec<IpAddr> {
        match self {
            Self::Fixed(servers) => servers.clone(),
            Self::In(file) => {
                let text = tokio::fs::read_to_string(file).await.unwrap_or_default();
                let server = |line: &str| line.strip_prefix("nameserver")?.trim().parse().ok();
                text.lines().filter_map(server).collect()
            }
        }
    }
}

/// Whether the resolvers forward questions about names of private networks. The upstreams may
/// trust this host with answers that sandboxes should not get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrivateNames {
    /// Such questions are forwarded like others.
    Asked,
    /// Such names do not exist for sandboxes.
    Denied,
}

/// The upstreams, read again when the cached list is too old.
struct Servers {
    upstreams: Upstreams,
    last: tokio::sync::Mutex<Option<(Instant, Vec<IpAddr>)>>,
}

impl Servers {
    async fn now(&self) -> Vec<IpAddr> {
        let mut last = self.last.lock().await;
        match &*last {
            Some((read, servers)) if read.elapsed() < SERVERS_HOLD => servers.clone(),
            _ => {
                let servers = self.upstreams.read().await;
                *last = Some((Instant::now(), servers.clone()));
                servers
            }
        }
    }
}

/// The sandboxes of a network by name, in lower case.
type Names = HashMap<String, Ipv4Addr>;

/// The resolvers of all networks.
pub(crate) struct Resolver {
    servers: Arc<Servers>,
    private_names: PrivateNames,
    networks: Mutex<HashMap<u32, Served>>,
}

/// The running resolver of a network. Dropping it ends the resolver.
struct Served {
    gateway: Ipv4Addr,
    names: Arc<Mutex<Names>>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Served {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Shared state that answering a question needs.
#[derive(Clone)]
struct Lookup {
    names: Arc<Mutex<Names>>,
    servers: Arc<Servers>,
    private_names: PrivateNames,
    open: Arc<Semaphore>,
}

impl Resolver {
    pub(crate) fn new(upstreams: Upstreams, private_names: PrivateNames) -> Self {
        let servers = Arc::new(Servers { upstreams, last: tokio::sync::Mutex::default() });
        Self { servers, private_names, networks: Mutex::default() }
    }

    /// Starts the resolver of a network, unless it already runs at the network's gateway.
    pub(crate) fn serve(&self, network: &Network) -> Result<(), NetError> {
        let mut networks = self.networks.lock();
        let gateway = network.gateway();
        if networks.get(&network.number).is_none_or(|served| served.gateway != gateway) {
            networks.remove(&network.number);
            networks.insert(network.number, self.start(network)?);
        }
        Ok(())
    }

    /// Takes over the names of a plan, and ends the resolvers of networks that are not in it.
    pub(crate) fn keep(&self, plan: &Plan) {
        let mut networks = self.networks.lock();
        networks.retain(|number, _| plan.networks.iter().any(|network| network.number == *number));
        for (number, served) in networks.iter() {
            let ports = plan.ports.iter().filter(|port| port.network == *number);
            let mut names = Names::new();
            for port in ports {
                // DNS ignores case. If names differ only in case, the first one counts.
                names.entry(port.name.to_ascii_lowercase()).or_insert(port.address);
            }
            *served.names.lock() = names;
        }
    }

    fn start(&self, network: &Network) -> Result<Served, NetError> {
        let gateway = network.gateway();
        let address = SocketAddr::from((gateway, PORT));
        let failed = |source| NetError::Resolver { address, source };
        // Bound to this network's bridge: no other network may look up its names, or use this
        // host as a resolver.
        let bridge = bridge_name(network.number);
        let datagrams = std::net::UdpSocket::bind(address).map_err(failed)?;
        datagrams.set_nonblocking(true).map_err(failed)?;
        let datagrams = UdpSocket::from_std(datagrams).map_err(failed)?;
        datagrams.bind_device(Some(bridge.as_bytes())).map_err(failed)?;
        let connections = TcpSocket::new_v4().map_err(failed)?;
        connections.bind_device(Some(bridge.as_bytes())).map_err(failed)?;
        connections.set_reuseaddr(true).map_err(failed)?;
        connections.bind(address).map_err(failed)?;
        let connections = connections.listen(CONNECTION_QUEUE).map_err(failed)?;
        let names = Arc::default();
        let lookup = Lookup {
            names: Arc::clone(&names),
            servers: Arc::clone(&self.servers),
            private_names: self.private_names,
            open: Arc::new(Semaphore::new(OPEN_QUESTIONS)),
        };
        let tasks = [
            tokio::spawn(serve_datagrams(Arc::new(datagrams), lookup.clone())),
            tokio::spawn(serve_connections(connections, lookup)),
        ];
        Ok(Served { gateway, names, tasks })
    }
}

async fn serve_datagrams(socket: Arc<UdpSocket>, lookup: Lookup) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let Ok(turn) = Arc::clone(&lookup.open).acquire_owned().await else { return };
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                debug!(%error, "Resolver failed to receive a datagram");
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                continue;
            }
        };
        let (socket, lookup, question) =
            (Arc::clone(&socket), lookup.clone(), buffer[..length].to_vec());
        tokio::spawn(async move {
            let _turn = turn;
            if let Some(answer) = lookup.ask(&question, ask_by_datagram).await {
                drop(socket.send_to(&answer, from).await);
            }
        });
    }
}

async fn serve_connections(listener: TcpListener, lookup: Lookup) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&connections).acquire_owned().await else { return };
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                debug!(%error, "Resolver failed to accept a connection");
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                continue;
            }
        };
        let lookup = lookup.clone();
        tokio::spawn(async move {
            let _turn = turn;
            if let Err(error) = converse(connection, &lookup).await {
                debug!(%error, "Resolver connection failed");
            }
        });
    }
}

/// Answers the questions of one connection, one after the other.
async fn converse(mut connection: TcpStream, lookup: &Lookup) -> io::Result<()> {
    let idle = |_| io::Error::from(io::ErrorKind::TimedOut);
    loop {
        let question = timeout(IDLE_LIMIT, read_message(&mut connection)).await.map_err(idle)??;
        let Ok(turn) = lookup.open.acquire().await else { return Ok(()) };
        let answer = lookup.ask(&question, ask_by_connection).await;
        drop(turn);
        let Some(answer) = answer else { return Ok(()) };
        timeout(IDLE_LIMIT, write_message(&mut connection, &answer)).await.map_err(idle)??;
    }
}

async fn read_message(connection: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; usize::from(connection.read_u16().await?)];
    connection.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(connection: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    connection.write_u16(length).await?;
    connection.write_all(message).await
}

impl Lookup {
    /// Returns the answer to a question, or `None` if the message is not a valid question.
    async fn ask(
        &self,
        question: &[u8],
        ask: impl AsyncFn(IpAddr, &[u8]) -> io::Result<Vec<u8>>,
    ) -> Option<Vec<u8>> {
        let parsed = parse(question)?;
        let answered = answer(&parsed, &self.names.lock(), self.private_names)?;
        let mut failure = match answered {
            Answer::Known(answer) => return Some(answer),
            Answer::Ask { failure } => failure,
        };
        for upstream in self.servers.now().await {
            match timeout(UPSTREAM_LIMIT, ask(upstream, question)).await {
                Ok(Ok(answer)) if answer.get(..2) == question.get(..2) => {
                    if is_final(&answer) {
                        return Some(answer);
                    }
                    // Another upstream may know. If none does, the client gets this failure.
                    failure = answer;
                }
                other => debug!(%upstream, ?other, "Upstream resolver did not answer"),
            }
        }
        Some(failure)
    }
}

/// Whether an answer says that the name exists or that it does not. Other codes mean that the
/// server cannot tell.
fn is_final(answer: &[u8]) -> bool {
    answer.get(3).is_some_and(|flags| matches!(flags & 0x0f, 0 | 3))
}

async fn ask_by_datagram(upstream: IpAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match upstream {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    // Each question gets its own source port, which an attacker has to guess to forge an answer.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect((upstream, PORT)).await?;
    socket.send(question).await?;
    let mut answer = vec![0; DATAGRAM_BYTES_MAX + 1];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length.min(DATAGRAM_BYTES_MAX));
    if length > DATAGRAM_BYTES_MAX
        && let Some(flags) = answer.get_mut(2)
    {
        // TC: the client asks again over TCP.
        *flags |= 0x02;
    }
    Ok(answer)
}

async fn ask_by_connection(upstream: IpAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut connection = TcpStream::connect((upstream, PORT)).await?;
    write_message(&mut connection, question).await?;
    read_message(&mut connection).await
}
