//! Interfaces, addresses and routes, by the kernel's route netlink: rtnetlink(7),
//! linux/rtnetlink.h, linux/if_addr.h. All numbers are in the machine's byte order.
//!
//! ```text
//!  nlmsghdr   length u32 · type u16 · flags u16 · sequence u32 · port u32
//!  body       ifinfomsg, ifaddrmsg or rtmsg
//!  attributes length u16 · type u16 · value, each padded to four bytes
//! ```

mod sockets;

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use bhatti_proto::GuestNetwork;
use rustix::net::netdevice::name_to_index;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

const HEADER_BYTES: usize = 16;
const ADDRESS_BODY_BYTES: usize = 8;
/// The size of the receive buffer that netlink(7) advises, in bytes. The kernel makes its answers
/// as large as the buffer, and has to search for memory for larger ones.
const ANSWER_BYTES: usize = 8 * 1024;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;

const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const REPLACE: u16 = 0x100;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;

const LINK_ADDRESS: u16 = 1;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const ROUTE_INTERFACE: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;

/// `NETLINK_ROUTE` and `NETLINK_SOCK_DIAG`.
const ROUTE: Option<Protocol> = None;
const SOCKETS: Option<Protocol> = Some(rustix::net::netlink::SOCK_DIAG);

/// The network card of a guest, if it has one.
const CARD: &str = "eth0";

const UP: u32 = 1;
const INET: u8 = 2;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_BOOT: u8 = 3;
const UNICAST: u8 = 1;

/// Brings `lo` up. The kernel assigns its addresses.
pub(crate) fn loopback_up() -> io::Result<()> {
    let netlink = Netlink::open(ROUTE)?;
    netlink.link_up(netlink.index("lo")?, None)
}

/// Gives an interface the address and route of `network`, in place of its old ones. Returns the
/// addresses that it lost.
pub(crate) fn configure(network: &GuestNetwork) -> io::Result<Vec<Ipv4Addr>> {
    let (address, prefix) = parse_address(&network.address)?;
    let mac = network.mac.as_deref().map(parse_mac).transpose()?;
    let gateway: Option<Ipv4Addr> =
        network.gateway.as_deref().map(str::parse).transpose().map_err(io::Error::other)?;
    let netlink = Netlink::open(ROUTE)?;
    let index = netlink.index(&network.interface)?;
    netlink.link_up(index, mac)?;
    // The old addresses first: a new address in their network would be secondary to them, and
    // would be removed with them.
    let mut left = netlink.remove_addresses(index)?;
    left.retain(|other| *other != address);
    netlink.change_address(NEW_ADDRESS, index, address, prefix)?;
    gateway.map_or(Ok(()), |gateway| netlink.default_route(index, gateway))?;
    Ok(left)
}

/// Removes an interface's addresses, and its routes with them.
pub(crate) fn forget(interface: &str) -> io::Result<()> {
    let netlink = Netlink::open(ROUTE)?;
    netlink.remove_addresses(netlink.index(interface)?).map(drop)
}

/// Ends the TCP connections from these addresses, because their peers belong to the parent
/// sandbox. Returns the number of connections.
pub(crate) fn cut_connections(addresses: &[Ipv4Addr]) -> io::Result<usize> {
    if addresses.is_empty() {
        return Ok(0);
    }
    sockets::cut(&Netlink::open(SOCKETS)?, addresses)
}

/// Brings the network card up, if there is one, without an address. Guests that are restored from
/// this one then need not do so, and share the memory of its receive buffers.
pub(crate) fn card_up() -> io::Result<()> {
    let netlink = Netlink::open(ROUTE)?;
    match netlink.index(CARD) {
        Ok(index) => {
            switch_off_ipv6(CARD)?;
            netlink.link_up(index, None)
        }
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Disables IPv6 on an interface: the network is IPv4 only, and no router assigns IPv6 addresses.
pub(crate) fn switch_off_ipv6(interface: &str) -> io::Result<()> {
    let switch = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match fs::write(&switch, "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // In a container, only the host can disable IPv6, and has done so.
        Err(_) if fs::read_to_string(&switch).is_ok_and(|now| now.trim() == "1") => Ok(()),
        written => written,
    }
}

fn parse_address(text: &str) -> io::Result<(Ipv4Addr, u8)> {
    let bad = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("`{text}` is not an IPv4 address with a prefix length"),
        )
    };
    let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or_else(bad)?;
    Ok((address.parse().map_err(|_| bad())?, prefix))
}

fn parse_mac(text: &str) -> io::Result<[u8; 6]> {
    let bad =
        || io::Error::new(io::ErrorKind::InvalidInput, format!("`{text}` is not a MAC address"));
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(bad)
}

struct Netlink(OwnedFd);

impl Netlink {
    fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        Ok(Self(socket))
    }

    fn index(&self, interface: &str) -> io::Result<u32> {
        Ok(name_to_index(&self.0, interface)?)
    }

    fn link_up(&self, index: u32, mac: Option<[u8; 6]>) -> io::Result<()> {
        let mut body = vec![0; 4];
        body.extend_from_slice(&index.to_ne_bytes());
        body.extend_from_slice(&UP.to_ne_bytes());
        body.extend_from_slice(&UP.to_ne_bytes());
        if let Some(mac) = mac {
            attribute(&mut body, LINK_ADDRESS, &mac);
        }
        self.change(NEW_LINK, 0, &body)
    }

    fn change_address(
        &self,
        kind: u16,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> io::Result<()> {
        let mut body = vec![INET, prefix, 0, 0];
        body.extend_from_slice(&index.to_ne_bytes());
        attribute(&mut body, LOCAL, &address.octets());
        attribute(&mut body, ADDRESS, &address.octets());
        self.change(kind, if kind == NEW_ADDRESS { CREATE | REPLACE } else { 0 }, &body)
    }

    /// Removes all addresses of an interface, and returns them.
    fn remove_addresses(&self, index: u32) -> io::Result<Vec<Ipv4Addr>> {
        let addresses = self.addresses(index)?;
        for &(address, prefix) in &addresses {
            self.change_address(DELETE_ADDRESS, index, address, prefix)?;
        }
        Ok(addresses.into_iter().map(|(address, _)| address).collect())
    }

    fn default_route(&self, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let mut body = vec![INET, 0, 0, 0, TABLE_MAIN, PROTOCOL_BOOT, 0, UNICAST, 0, 0, 0, 0];
        attribute(&mut body, ROUTE_GATEWAY, &gateway.octets());
        attribute(&mut body, ROUTE_INTERFACE, &index.to_ne_bytes());
        self.change(NEW_ROUTE, CREATE | REPLACE, &body)
    }

    /// The addresses of an interface, with their prefix lengths.
    fn addresses(&self, index: u32) -> io::Result<Vec<(Ipv4Addr, u8)>> {
        let mut found = Vec::new();
        self.list(GET_ADDRESS, &[INET, 0, 0, 0, 0, 0, 0, 0], |kind, body| {
            if kind != NEW_ADDRESS || body.len() < ADDRESS_BODY_BYTES {
                return;
            }
            let of_interface = body[4..8] == index.to_ne_bytes();
            let local = attributes(&body[ADDRESS_BODY_BYTES..]).find(|(kind, _)| *kind == LOCAL);
            let octets = local.and_then(|(_, value)| value.first_chunk::<4>());
            let octets = octets.filter(|_| of_interface);
            found.extend(octets.map(|octets| (Ipv4Addr::from(*octets), body[1])));
        })?;
        Ok(found)
    }

    /// Sends a dump request, and passes each message of the answer to `each`.
    fn list(&self, kind: u16, body: &[u8], mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.send(kind, DUMP, body)?;
        loop {
            let answer = self.receive()?;
            for (kind, body) in messages(&answer) {
                match kind {
                    ERROR => return Err(error_of(body)),
                    DONE => return Ok(()),
                    kind => each(kind, body),
                }
            }
        }
    }

    /// Sends a request and waits for its acknowledgment.
    fn change(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.send(kind, flags | ACKNOWLEDGE, body)?;
        let answer = self.receive()?;
        let code =
            messages(&answer).find(|(kind, _)| *kind == ERROR).map(|(_, body)| error_code(body));
        match code {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(code)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(HEADER_BYTES + body.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(body);
        send(&self.0, &message, SendFlags::empty())?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut answer = vec![0; ANSWER_BYTES];
        let (length, _) = recv(&self.0, &mut answer[..], RecvFlags::empty())?;
        answer.truncate(length);
        Ok(answer)
    }
}

/// The error of an acknowledgment, as a positive number; 0 is none.
fn error_code(body: &[u8]) -> i32 {
    body.first_chunk::<4>().map_or(libc::EPROTO, |code| -i32::from_ne_bytes(*code))
}

fn error_of(body: &[u8]) -> io::Error {
    io::Error::from_raw_os_error(error_code(body))
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Messages as (type, body).
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes([*bytes.get(4)?, *bytes.get(5)?]);
        let body = bytes.get(HEADER_BYTES..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Attributes as (type, value).
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
mod tests {
    use bhatti_host::process::command;
    use bhatti_testkit::skip;
    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;

    #[test]
    fn addresses_are_checked() {
        assert_eq!(parse_address("10.0.1.2/24").unwrap(), (Ipv4Addr::new(10, 0, 1, 2), 24));
        assert_eq!(parse_mac("02:00:00:00:00:0a").unwrap(), [2, 0, 0, 0, 0, 10]);
        for bad in ["10.0.1.2", "10.0.1.2/33", "10.0.1/24", "x/24", ""] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
        assert!(parse_mac("02:00").is_err());
    }

    #[test]
    fn loopback_has_the_address_that_the_kernel_gave_it() {
        let netlink = Netlink::open(ROUTE).unwrap();

        let addresses = netlink.addresses(netlink.index("lo").unwrap()).unwrap();

        assert!(addresses.contains(&(Ipv4Addr::LOCALHOST, 8)), "{addresses:?}");
        assert!(netlink.index("../lo").is_err());
    }

    /// Runs `test` in a network namespace of its own, so that it does not change the machine's
    /// network. There, `eth0` is one end of a veth pair.
    fn with_own_network(test: impl FnOnce() + Send + 'static) {
        let in_thread = move || {
            // SAFETY: only this thread's view of the network changes.
            #[expect(unsafe_code, reason = "a thread must not lose resources that it shares")]
            if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
                skip("addresses, routes and link addresses by netlink", &error.to_string());
                return;
            }
            ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
            ip(&["link", "set", "eth1", "up"]);
            test();
        };
        std::thread::spawn(in_thread).join().unwrap();
    }

    fn ip(arguments: &[&str]) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let output =
            runtime.block_on(async { command("ip").args(arguments).output().await }).unwrap();
        assert!(output.status.success(), "ip {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn network(address: &str, gateway: &str, mac: &str) -> GuestNetwork {
        GuestNetwork {
            interface: "eth0".into(),
            address: address.into(),
            gateway: Some(gateway.into()),
            mac: Some(mac.into()),
        }
    }

    #[test]
    fn interface_has_the_address_link_address_and_route_of_the_last_configuration_only() {
        with_own_network(|| {
            configure(&network("10.1.2.3/24", "10.1.2.1", "02:00:00:00:00:01")).unwrap();
            configure(&network("10.1.2.9/24", "10.1.2.254", "02:00:00:00:00:02")).unwrap();

            let link = ip(&["-o", "link", "show", "eth0"]);
            assert!(link.contains("02:00:00:00:00:02") && link.contains(",UP"), "{link}");
            let addresses = ip(&["-o", "-4", "address", "show", "eth0"]);
            assert!(
                addresses.contains("10.1.2.9/24") && addresses.lines().count() == 1,
                "{addresses}"
            );
            let routes = ip(&["route", "show", "default"]);
            assert!(routes.starts_with("default via 10.1.2.254 dev eth0"), "{routes}");
            assert_eq!(routes.lines().count(), 1, "{routes}");
        });
    }

    #[test]
    fn forgetting_an_interface_removes_its_address_and_route() {
        with_own_network(|| {
            configure(&network("10.1.2.3/24", "10.1.2.1", "02:00:00:00:00:01")).unwrap();

            forget("eth0").unwrap();

            assert_eq!(ip(&["-o", "-4", "address", "show", "eth0"]), "");
            assert_eq!(ip(&["route", "show"]), "");
        });
    }

    #[test]
    fn missing_interface_is_an_error() {
        with_own_network(|| {
            ip(&["link", "delete", "eth0"]);
            let wanted = network("10.1.2.3/24", "10.1.2.1", "02:00:00:00:00:01");
            assert_eq!(configure(&wanted).unwrap_err().raw_os_error(), Some(libc::ENODEV));
        });
    }

    #[test]
    fn invalid_attributes_and_messages_end_the_iteration() {
        assert_eq!(attributes(&[0; 64]).count(), 0);
        assert_eq!(messages(&[0xff; 64]).count(), 0);
    }
}
