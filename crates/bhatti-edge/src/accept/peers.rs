//! Limits the connections that an address may keep open without a request.
//!
//! A connection is *silent* from the moment it is accepted until the head of a request has
//! arrived, and again between two requests. If an address has too many silent connections, or the
//! listener is full, the oldest silent connection is closed. Silent connections thus never keep
//! out a caller that sends a request.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant, sleep_until};

/// Maximum number of silent connections of one address. A loopback address may have more: a proxy
/// in front of the daemon is one address for all its callers.
const SILENT_OF_ADDRESS_MAX: usize = 64;
const SILENT_OF_LOOPBACK_MAX: usize = 1024;

/// Length of an IPv6 network, in bytes of the address. One customer often has all addresses of
/// such a network.
const IPV6_NETWORK_BYTES: usize = 8;

/// The connections of one listener.
pub(crate) struct Peers {
    inner: Mutex<Inner>,
    limit: usize,
}

#[derive(Default)]
struct Inner {
    connections: usize,
    last_number: u64,
    /// Silent connections, the oldest first.
    silent: BTreeMap<u64, (Network, Arc<Notify>)>,
    of_network: HashMap<Network, usize>,
}

/// Origin of a connection: an IPv4 address or an IPv6 network. `None` is a Unix socket.
type Network = Option<IpAddr>;

/// One connection, counted until this is dropped.
pub(crate) struct Seat {
    peers: Arc<Peers>,
    network: Network,
    /// The number of requests in flight. HTTP/2 has several.
    asking: AtomicUsize,
    /// Whether one of its requests was admitted.
    admitted: AtomicBool,
    number: Mutex<Option<u64>>,
    silent_since: Mutex<Instant>,
    /// Notified when the connection must close.
    pub(crate) closed: Arc<Notify>,
}

/// A request in flight. The connection is not silent until the last of them is dropped.
pub(crate) struct Asking(Arc<Seat>);

impl Peers {
    /// Creates an empty set for at most `limit` connections.
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::default(), limit })
    }

    /// Returns a place for a new connection, if necessary that of a silent one. Returns `None` if
    /// all other connections have a request in flight.
    pub(crate) fn enter(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Arc<Seat>> {
        let network = address.map(network_of);
        let mut inner = self.inner.lock();
        let most = match network {
            None => usize::MAX,
            Some(address) if address.is_loopback() => SILENT_OF_LOOPBACK_MAX,
            Some(_) => SILENT_OF_ADDRESS_MAX,
        };
        if inner.of_network.get(&network).is_some_and(|silent| *silent >= most) {
            inner.close_oldest(|of| *of == network);
        }
        if inner.connections >= self.limit && !inner.close_oldest(|_| true) {
            return None;
        }
        inner.connections += 1;
        let place = Seat {
            peers: Arc::clone(self),
            network,
            asking: AtomicUsize::new(0),
            admitted: AtomicBool::new(false),
            number: Mutex::new(None),
            silent_since: Mutex::new(Instant::now()),
            closed: Arc::new(Notify::new()),
        };
        inner.fall_silent(&place);
        Some(Arc::new(place))
    }
}

impl Inner {
    fn fall_silent(&mut self, place: &Seat) {
        self.last_number += 1;
        let number = self.last_number;
        self.silent.insert(number, (place.network, Arc::clone(&place.closed)));
        *self.of_network.entry(place.network).or_default() += 1;
        *place.number.lock() = Some(number);
        *place.silent_since.lock() = Instant::now();
    }

    fn forget_silent(&mut self, number: u64) {
        let Some((network, _)) = self.silent.remove(&number) else { return };
        if let Some(count) = self.of_network.get_mut(&network) {
            *count -= 1;
            if *count == 0 {
                self.of_network.remove(&network);
            }
        }
    }

    /// Closes the oldest silent connection that `is_wanted` accepts. Returns whether there was
    /// one.
    fn close_oldest(&mut self, is_wanted: impl Fn(&Network) -> bool) -> bool {
        let oldest = self.silent.iter().find(|(_, (network, _))| is_wanted(network));
        let Some((&number, (_, closed))) = oldest else { return false };
        closed.notify_one();
        self.forget_silent(number);
        // The place counts as free from here on, although the connection's task has not ended
        // yet.
        true
    }
}

impl Seat {
    /// Records that the head of a request has arrived.
    pub(crate) fn ask(self: &Arc<Self>) -> Asking {
        let mut inner = self.peers.inner.lock();
        // Counted under the lock, as the end of a request is.
        self.asking.fetch_add(1, Ordering::Relaxed);
        if let Some(number) = self.number.lock().take() {
            inner.forget_silent(number);
        }
        Asking(Arc::clone(self))
    }

    /// Resolves when the connection has been silent for `limit`, or for `kept_limit` if one of its
    /// requests was admitted. Cancel safe.
    pub(crate) async fn long_silent(&self, limit: Duration, kept_limit: Duration) {
        loop {
            let limit = if self.admitted.load(Ordering::Relaxed) { kept_limit } else { limit };
            let until = match self.asking.load(Ordering::Relaxed) {
                0 => *self.silent_since.lock() + limit,
                _ => Instant::now() + limit,
            };
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }
}

impl Asking {
    /// Records that the request was admitted.
    pub(crate) fn admit(&self) {
        self.0.admitted.store(true, Ordering::Relaxed);
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        let mut inner = self.0.peers.inner.lock();
        if self.0.asking.fetch_sub(1, Ordering::Relaxed) == 1 {
            inner.fall_silent(&self.0);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut inner = self.peers.inner.lock();
        inner.connections -= 1;
        if let Some(number) = self.number.get_mut().take() {
            inner.forget_silent(number);
        }
    }
}

fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            let mut octets = address.octets();
            octets[IPV6_NETWORK_BYTES..].fill(0);
            IpAddr::V6(octets.into())
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    async fn is_closed(place: &Seat) -> bool {
        timeout(Duration::from_millis(1), place.closed.notified()).await.is_ok()
    }

    fn address(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[tokio::test]
    async fn only_the_oldest_silent_connection_of_an_address_is_closed() {
        let peers = Peers::new(1000);
        let other = peers.enter(address("192.0.2.1")).unwrap();
        let mut places = Vec::new();
        for last in 0..SILENT_OF_ADDRESS_MAX {
            places.push(peers.enter(address(&format!("2001:db8::{last:x}"))).unwrap());
        }
        let asking = places[0].ask();

        for _ in 0..2 {
            places.push(peers.enter(address("2001:db8::ffff")).unwrap());
        }

        assert!(!is_closed(&places[0]).await && is_closed(&places[1]).await);
        assert!(!is_closed(&places[2]).await && !is_closed(&other).await);
        // A connection that has its response is the newest silent one.
        drop(asking);
        places.push(peers.enter(address("2001:db8::1")).unwrap());
        assert!(!is_closed(&places[0]).await && is_closed(&places[2]).await);
    }

    #[tokio::test]
    async fn full_listener_closes_a_silent_connection_or_refuses_the_new_one() {
        let peers = Peers::new(3);
        let places =
            ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|from| peers.enter(address(from)).unwrap());
        let asking = [places[0].ask(), places[2].ask()];

        let last = peers.enter(address("192.0.2.4")).unwrap();
        assert!(is_closed(&places[1]).await);
        // The closed connection has not ended yet; the newest one is the only silent one.
        let third = last.ask();
        assert!(peers.enter(address("192.0.2.5")).is_none());

        drop((places, asking, third));
        assert!(peers.enter(address("192.0.2.5")).is_some());
        assert!(peers.inner.lock().of_network.len() <= 1);
    }

    #[tokio::test]
    async fn connection_is_silent_after_the_last_of_its_requests() {
        let peers = Peers::new(1);
        let place = peers.enter(None).unwrap();
        let (first, second) = (place.ask(), place.ask());
        drop(first);
        assert!(peers.enter(None).is_none(), "the second request is in flight");
        drop(second);
        assert!(peers.enter(None).is_some());
    }
}
