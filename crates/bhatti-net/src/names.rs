//! Names of interfaces, and link addresses.
//!
//! An interface's name has at most 15 bytes. The names made here fit, and no two interfaces get
//! the same name.

use std::fmt;
use std::net::Ipv4Addr;

use bhatti_types::SandboxId;

/// Digits of a tap's name: 64 bits, five at a time, each digit one of `0-9a-v`.
const TAP_DIGITS: u32 = 13;

/// The first two bytes of link addresses: locally administered, unicast.
const GUEST_PREFIX: [u8; 2] = [0x06, 0x62];
const BRIDGE_PREFIX: [u8; 2] = [0x02, 0x62];

/// Returns the name of a sandbox's tap, the interface on this host at the other end of its
/// network card.
#[must_use]
pub fn tap_name(id: SandboxId) -> String {
    let number = id.as_u64();
    let digit = |place| u32::try_from((number >> (5 * place)) & 31).ok();
    let digits = (0..TAP_DIGITS).rev().filter_map(digit);
    let digits: String = digits.filter_map(|digit| char::from_digit(digit, 32)).collect();
    format!("bh{digits}")
}

/// Returns the name of a network's bridge.
#[must_use]
pub fn bridge_name(number: u32) -> String {
    format!("bhatti{number}")
}

/// Returns the number of the network that has this bridge.
pub(crate) fn bridge_number(name: &str) -> Option<u32> {
    let number = name.strip_prefix("bhatti")?.parse().ok()?;
    (bridge_name(number) == name).then_some(number)
}

/// A link address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Returns the link address of the network card with this IP address. The mapping is fixed,
    /// so a neighbor entry stays true when the next sandbox has the IP address.
    #[must_use]
    pub const fn of_guest(address: Ipv4Addr) -> Self {
        let ([x, y], [a, b, c, d]) = (GUEST_PREFIX, address.octets());
        Self([x, y, a, b, c, d])
    }

    /// Returns the link address of a daemon's bridges. A bridge has it from its creation on, so
    /// it can be recognized as this daemon's at any time.
    pub(crate) const fn of_bridges(instance: Instance) -> Self {
        let ([x, y], [a, b, c, d]) = (BRIDGE_PREFIX, instance.0.to_be_bytes());
        Self([x, y, a, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Tells the daemons on a host apart. Never zero: that is the group of interfaces without an
/// assigned group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance(pub u32);

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_fit_an_interface_and_differ() {
        let ids = [0, 1, 31, 32, 1 << 63, u64::MAX, u64::MAX - 1, 0x0123_4567_89ab_cdef];
        let ids = ids.into_iter().chain((0..64).map(|bit| 1 << bit));
        let ids: HashSet<u64> = ids.collect();
        let taps: HashSet<String> =
            ids.iter().map(|id| tap_name(SandboxId::from_entropy(id.to_be_bytes()))).collect();
        assert_eq!(taps.len(), ids.len());
        assert!(taps.iter().all(|name| name.len() == 15), "{taps:?}");
        for number in [0, 255, 256, 65_535, u32::MAX] {
            let name = bridge_name(number);
            assert_eq!(bridge_number(&name), Some(number));
            assert!(number > 99_999_999 || name.len() <= 15);
        }
        for other in ["bhatti", "bhatti-1", "bhatti01", "bhatti+1", "br0"] {
            assert_eq!(bridge_number(other), None, "{other}");
        }
    }

    #[test]
    fn link_addresses_are_unique_and_unicast() {
        let one = Mac::of_guest(Ipv4Addr::new(10, 213, 0, 2));
        assert_eq!(one.to_string(), "06:62:0a:d5:00:02");
        assert_ne!(one, Mac::of_guest(Ipv4Addr::new(10, 213, 1, 2)));
        for Mac([first, ..]) in [one, Mac::of_bridges(Instance(7))] {
            assert_eq!(first & 3, 2, "locally administered and unicast");
        }
    }
}
