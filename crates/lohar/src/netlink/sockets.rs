//! Ends TCP connections by sock_diag(7): linux/inet_diag.h.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::{INET, Netlink};

const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

const INET6: u8 = 10;
const TCP: u8 = 6;

/// All states except listening: a listening socket is no connection.
const CONNECTED: u32 = !(1 << 10);

/// The offset of `inet_diag_sockid` in `inet_diag_msg` and in `inet_diag_req_v2`, its size, and
/// the offset of the source address in it.
const ID_IN_MESSAGE: usize = 4;
const ID_IN_REQUEST: usize = 8;
const ID_BYTES: usize = 48;
const SOURCE_IN_ID: usize = 4;

/// See [`super::cut_connections`].
pub(super) fn cut(netlink: &Netlink, addresses: &[Ipv4Addr]) -> io::Result<usize> {
    let mut cut = 0;
    // A listener for both versions has IPv4 connections under IPv4-mapped IPv6 addresses.
    for family in [INET, INET6] {
        let mut found = Vec::new();
        netlink.list(BY_FAMILY, &request(family, &[0; ID_BYTES]), |kind, body| {
            let id =
                body.get(ID_IN_MESSAGE..ID_IN_MESSAGE + ID_BYTES).filter(|_| kind == BY_FAMILY);
            if id.and_then(|id| source(family, id)).is_some_and(|it| addresses.contains(&it)) {
                found.extend(id.map(<[u8]>::to_vec));
            }
        })?;
        for id in found {
            match netlink.change(DESTROY, 0, &request(family, &id)) {
                Ok(()) => cut += 1,
                // The connection has ended by itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(cut)
}

/// Returns the IPv4 source address of a connection.
fn source(family: u8, id: &[u8]) -> Option<Ipv4Addr> {
    let source = &id[SOURCE_IN_ID..];
    match family {
        INET => source.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets)),
        _ => Ipv6Addr::from(*source.first_chunk::<16>()?).to_ipv4_mapped(),
    }
}

/// `inet_diag_req_v2`.
fn request(family: u8, id: &[u8]) -> Vec<u8> {
    let mut body = vec![family, TCP, 0, 0];
    body.extend_from_slice(&CONNECTED.to_ne_bytes());
    body.extend_from_slice(id);
    debug_assert_eq!(body.len(), ID_IN_REQUEST + ID_BYTES);
    body
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::netlink::SOCKETS;

    /// Uses a loopback address that no other test uses.
    #[test]
    fn connections_from_an_address_end_and_others_stay_open() {
        let (left, kept) = (Ipv4Addr::new(127, 213, 7, 9), Ipv4Addr::LOCALHOST);
        // Listens on both versions, as most servers do.
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        let at = (left, listener.local_addr().unwrap().port());
        let other = TcpListener::bind((kept, 0)).unwrap();
        let mut connection = TcpStream::connect(at).unwrap();
        let mut accepted = listener.accept().unwrap().0;
        let going_on = TcpStream::connect(other.local_addr().unwrap()).unwrap();

        let netlink = match Netlink::open(SOCKETS) {
            Ok(netlink) => netlink,
            Err(error) => panic!("{error}"),
        };
        let cut = match cut(&netlink, &[left]) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                bhatti_testkit::skip(
                    "ending connections by sock_diag",
                    "this kernel has no SOCK_DESTROY",
                );
                return;
            }
            cut => cut.unwrap(),
        };

        assert!(cut >= 1);
        assert!(accepted.read(&mut [0]).is_err(), "the connection was ended");
        assert!(connection.read(&mut [0]).is_err() || cut == 1);
        assert_eq!(going_on.take_error().unwrap().map(|error| error.kind()), None);
        assert!(listener.set_nonblocking(true).is_ok(), "the listener stays open");
    }
}
