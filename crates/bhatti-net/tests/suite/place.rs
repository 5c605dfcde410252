//! Guests and an outside world around this host, each in a network namespace.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use bhatti_net::{Mac, Port, tap_name};
use bhatti_types::{Allowance, SandboxId};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Name, Packet, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE};

/// Timeout of a connection attempt. An attempt whose packets are dropped takes this long.
pub(crate) const LIMIT: Duration = Duration::from_millis(1500);

pub(crate) fn ip(arguments: &[&str]) -> String {
    output("ip", arguments)
}

pub(crate) fn nft(arguments: &[&str]) -> String {
    output("nft", arguments)
}

fn output(program: &str, arguments: &[&str]) -> String {
    #[expect(clippy::disallowed_methods, reason = "must run in this thread's namespace")]
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns a port of a sandbox whose id is derived from its name and address.
pub(crate) fn port_of(network: u32, address: Ipv4Addr, name: &str, allow: Allowance) -> Port {
    let sum = name.bytes().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let entropy = u64::from(sum) << 32 | u64::from(u32::from(address));
    let tap = tap_name(SandboxId::from_entropy(entropy.to_be_bytes()));
    let epoch = sum.max(1) ^ u32::from(address);
    Port { tap, network, address, name: name.to_owned(), allow, epoch }
}

/// A network namespace that a veth pair connects to this host.
pub(crate) struct Guest {
    namespace: File,
    tap: String,
    pub(crate) address: Ipv4Addr,
}

impl Guest {
    /// Starts a guest at the other end of `tap`, configured as a sandbox's guest configures
    /// itself.
    pub(crate) fn start(tap: &str, address: Ipv4Addr) -> Self {
        let guest = Self { namespace: new_namespace(), tap: tap.to_owned(), address };
        let mac = Mac::of_guest(address).to_string();
        guest.plug(&mac);
        let [a, b, c, _] = address.octets();
        guest.ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"]);
        guest.ip(&["link", "set", "eth0", "up"]);
        guest.ip(&["route", "add", "default", "via", &format!("{a}.{b}.{c}.1")]);
        guest
    }

    /// Starts the outside world with these addresses. This host's default route leads there.
    pub(crate) fn world(addresses: &[Ipv4Addr]) -> Self {
        let address = Ipv4Addr::new(203, 0, 113, 2);
        let world = Self { namespace: new_namespace(), tap: "world".to_owned(), address };
        world.plug("02:00:00:00:00:01");
        ip(&["address", "add", &format!("{}/24", world.gateway()), "dev", "world"]);
        ip(&["link", "set", "world", "up"]);
        world.ip(&["address", "add", "203.0.113.2/24", "dev", "eth0"]);
        world.ip(&["link", "set", "eth0", "up"]);
        for address in addresses {
            world.ip(&["address", "add", &format!("{address}/32"), "dev", "eth0"]);
        }
        ip(&["route", "add", "default", "via", "203.0.113.2"]);
        world.ip(&["route", "add", "default", "via", &world.gateway().to_string()]);
        world
    }

    /// Returns this host's address on the veth pair to the world.
    pub(crate) fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(203, 0, 113, 100)
    }

    fn plug(&self, mac: &str) {
        let namespace = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            std::os::fd::AsRawFd::as_raw_fd(&self.namespace)
        );
        let cable =
            ["link", "add", &self.tap, "type", "veth", "peer", "name", "eth0", "address", mac];
        ip(&[&cable[..], &["netns", &namespace]].concat());
    }

    /// Removes the veth pair, as a VM's end removes its tap.
    pub(crate) fn end(self) {
        ip(&["link", "delete", &self.tap]);
    }

    /// Waits until the link carries packets: a new port of a bridge takes a moment.
    pub(crate) fn wait_for_link(&self) {
        self.inside(|| {
            for _ in 0..1000 {
                let state = std::fs::read_to_string("/proc/thread-self/net/route").unwrap();
                if state.lines().count() > 2 {
                    return;
                }
                thread::yield_now();
            }
            panic!("the link carries no packets");
        });
    }

    /// Runs a closure in the namespace.
    fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter(&self.namespace);
                run()
            });
            inside.join().unwrap()
        })
    }

    pub(crate) fn ip(&self, arguments: &[&str]) {
        self.inside(|| ip(arguments));
    }

    /// Answers each connection to `port` with the client's address, until the test ends.
    pub(crate) fn serve(&self, port: u16) {
        let listener =
            self.inside(|| TcpListener::bind((std::net::Ipv6Addr::UNSPECIFIED, port)).unwrap());
        answer_all(listener);
    }

    pub(crate) fn send_datagram(&self, to: Ipv4Addr, port: u16) {
        self.inside(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.send_to(b"hello", (to, port)).unwrap();
        });
    }

    /// Returns the answer at `to`: the address that the server sees.
    pub(crate) fn get(&self, to: SocketAddr) -> Result<String, String> {
        self.inside(|| get_here(to))
    }

    /// Opens a connection to `to`.
    pub(crate) fn connect(&self, to: SocketAddr) -> Option<TcpStream> {
        self.inside(|| TcpStream::connect_timeout(&to, LIMIT).ok())
    }

    /// Echoes everything that connections to `port` send, until the test ends.
    pub(crate) fn serve_echo(&self, port: u16) {
        let listener = self.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
        thread::spawn(move || {
            let mut kept = Vec::new();
            while let Ok((mut connection, _)) = listener.accept() {
                kept.push(connection.try_clone().unwrap());
                thread::Builder::new()
                    .stack_size(64 << 10)
                    .spawn(move || {
                        let mut byte = [0];
                        while connection.read_exact(&mut byte).is_ok()
                            && connection.write_all(&byte).is_ok()
                        {}
                    })
                    .unwrap();
            }
        });
    }

    /// Sends a byte every few milliseconds on each connection to `port`, until the test ends.
    pub(crate) fn serve_ticks(&self, port: u16) {
        let listener = self.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
        thread::spawn(move || {
            while let Ok((mut connection, _)) = listener.accept() {
                thread::spawn(move || {
                    while connection.write_all(b"x").is_ok() {
                        thread::park_timeout(Duration::from_millis(1));
                    }
                });
            }
        });
    }

    /// Accepts connections at `port` and sends nothing, until the test ends.
    pub(crate) fn serve_silence(&self, port: u16) {
        let listener = self.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
        thread::spawn(move || {
            let mut kept = Vec::new();
            while let Ok((connection, _)) = listener.accept() {
                kept.push(connection);
            }
        });
    }

    /// As [`get`](Self::get), from the source address `from`.
    pub(crate) fn get_from(&self, from: Ipv4Addr, to: SocketAddr) -> Result<String, String> {
        self.inside(|| {
            // A connection and a datagram take the same path: the rules check their source in the
            // same place.
            let socket = rustix::net::socket(
                rustix::net::AddressFamily::INET,
                rustix::net::SocketType::STREAM,
                None,
            )
            .unwrap();
            rustix::net::bind(&socket, &SocketAddrV4::new(from, 0)).unwrap();
            rustix::net::sockopt::set_socket_timeout(
                &socket,
                rustix::net::sockopt::Timeout::Send,
                Some(LIMIT),
            )
            .unwrap();
            rustix::net::connect(&socket, &to).map_err(|error| error.to_string())?;
            read_answer(TcpStream::from(socket))
        })
    }
}

fn new_namespace() -> File {
    let made = thread::spawn(|| {
        bhatti_host::namespace::enter_own_network().unwrap();
        ip(&["link", "set", "lo", "up"]);
        File::open("/proc/thread-self/ns/net").unwrap()
    });
    made.join().unwrap()
}

fn enter(namespace: &File) {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

pub(crate) fn serve_here(address: SocketAddrV4) {
    answer_all(TcpListener::bind(address).unwrap());
}

fn answer_all(listener: TcpListener) {
    thread::spawn(move || {
        while let Ok((mut connection, from)) = listener.accept() {
            let from = match from.ip() {
                IpAddr::V6(address) => address
                    .to_ipv4_mapped()
                    .map_or_else(|| address.to_string(), |it| it.to_string()),
                IpAddr::V4(address) => address.to_string(),
            };
            drop(connection.write_all(from.as_bytes()));
        }
    });
}

pub(crate) fn get_here(to: SocketAddr) -> Result<String, String> {
    let connected = TcpStream::connect_timeout(&to, LIMIT);
    read_answer(connected.map_err(|error| error.to_string())?)
}

fn read_answer(mut connection: TcpStream) -> Result<String, String> {
    connection.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    Ok(answer)
}

/// Asks the resolver at `server` for the addresses of `name`. Returns the response code if it is
/// an error.
pub(crate) async fn ask_name(
    guest: &Guest,
    server: Ipv4Addr,
    name: &str,
    by_connection: bool,
) -> Result<Vec<Ipv4Addr>, String> {
    let mut packet = Packet::new_query(7);
    packet.set_flags(simple_dns::PacketFlag::RECURSION_DESIRED);
    let class = QCLASS::CLASS(CLASS::IN);
    packet.questions.push(Question::new(Name::new(name).unwrap(), TYPE::A.into(), class, false));
    let question = packet.build_bytes_vec().unwrap();
    let namespace = guest.namespace.try_clone().unwrap();
    // Runs in another thread, because the resolver runs in this one.
    let answer = tokio::task::spawn_blocking(move || {
        enter(&namespace);
        if by_connection {
            let mut connection = TcpStream::connect((server, 53)).unwrap();
            let length = u16::try_from(question.len()).unwrap();
            connection.write_all(&length.to_be_bytes()).unwrap();
            connection.write_all(&question).unwrap();
            let mut length = [0; 2];
            connection.read_exact(&mut length).unwrap();
            let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
            connection.read_exact(&mut answer).unwrap();
            answer
        } else {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.set_read_timeout(Some(LIMIT * 4)).unwrap();
            socket.send_to(&question, (server, 53)).unwrap();
            let mut answer = vec![0; 4096];
            let length = socket.recv(&mut answer).unwrap();
            answer.truncate(length);
            answer
        }
    });
    let answer = answer.await.unwrap();
    let answer = Packet::parse(&answer).unwrap();
    assert_eq!(answer.id(), 7);
    if answer.rcode() != RCODE::NoError {
        return Err(format!("{:?}", answer.rcode()));
    }
    let address = |record: &ResourceRecord<'_>| match &record.rdata {
        RData::A(a) => Some(Ipv4Addr::from(a.address)),
        _ => None,
    };
    Ok(answer.answers.iter().filter_map(address).collect())
}

/// Whether a byte that is sent on a connection comes back.
pub(crate) fn echoes(connection: &mut TcpStream) -> bool {
    connection.set_read_timeout(Some(LIMIT)).unwrap();
    let mut byte = [0];
    connection.write_all(b"x").is_ok() && connection.read_exact(&mut byte).is_ok()
}

/// Starts a resolver on this host that always fails.
pub(crate) fn serve_failures_here(address: Ipv4Addr) {
    let datagrams = UdpSocket::bind((address, 53)).unwrap();
    thread::spawn(move || {
        let mut question = vec![0; 4096];
        while let Ok((length, from)) = datagrams.recv_from(&mut question) {
            let packet = Packet::parse(&question[..length]).unwrap();
            let mut reply = Packet::new_reply(packet.id());
            *reply.rcode_mut() = RCODE::ServerFailure;
            reply.questions.push(packet.questions[0].clone());
            drop(datagrams.send_to(&reply.build_bytes_vec().unwrap(), from));
        }
    });
}

/// Starts a resolver on this host that knows one name.
pub(crate) fn serve_names_here(known: &'static str, address: Ipv4Addr) {
    let answer = move |question: &[u8]| {
        let packet = Packet::parse(question).unwrap();
        let asked = packet.questions[0].clone();
        let mut reply = Packet::new_reply(packet.id());
        if asked.qname.to_string() == known && asked.qtype == QTYPE::TYPE(TYPE::A) {
            let data = RData::A(A::from(address));
            reply.answers.push(ResourceRecord::new(asked.qname.clone(), CLASS::IN, 60, data));
        } else {
            *reply.rcode_mut() = RCODE::NameError;
        }
        reply.questions.push(asked);
        reply.build_bytes_vec().unwrap()
    };
    let (datagrams, connections) = (
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)).unwrap(),
        TcpListener::bind((Ipv4Addr::LOCALHOST, 53)).unwrap(),
    );
    let (ready, is_ready) = mpsc::channel();
    thread::spawn(move || {
        ready.send(()).unwrap();
        let mut question = vec![0; 4096];
        while let Ok((length, from)) = datagrams.recv_from(&mut question) {
            drop(datagrams.send_to(&answer(&question[..length]), from));
        }
    });
    thread::spawn(move || {
        while let Ok((mut connection, _)) = connections.accept() {
            let mut length = [0; 2];
            connection.read_exact(&mut length).unwrap();
            let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
            connection.read_exact(&mut question).unwrap();
            let answer = answer(&question);
            let length = u16::try_from(answer.len()).unwrap();
            connection.write_all(&length.to_be_bytes()).unwrap();
            connection.write_all(&answer).unwrap();
        }
    });
    is_ready.recv().unwrap();
}
