//! Which addresses the daemon connects to for its users.
//!
//! A user chooses the registry, the registry chooses where it redirects and where tokens are
//! issued. So every connection is checked after its name is resolved, and goes to the address
//! that was checked. Source of the ranges: the IANA registries of special-purpose addresses.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::LazyLock;

use ipnet::IpNet;

/// Ranges that are not on the Internet.
const SPECIAL: [&str; 26] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/127",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/23",
    "2001:db8::/32",
    "2002::/16",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/9",
    "ff00::/8",
];

/// Prefix of IPv6 addresses that stand for IPv4 addresses (NAT64).
const NAT64: [u16; 6] = [0x64, 0xff9b, 0, 0, 0, 0];

static RANGES: LazyLock<Vec<IpNet>> =
    LazyLock::new(|| SPECIAL.iter().filter_map(|range| range.parse().ok()).collect());

/// Whether an address is on the Internet.
pub(crate) fn is_public(address: IpAddr) -> bool {
    let address = embedded(address);
    !RANGES.iter().any(|range| range.contains(&address))
}

/// Returns the IPv4 address that an IPv6 address stands for, or the address itself.
fn embedded(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let is_nat64 = v6.segments()[..6] == NAT64;
    if is_nat64 {
        let [.., a, b, c, d] = v6.octets();
        return IpAddr::from([a, b, c, d]);
    }
    Ipv6Addr::to_canonical(&v6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_on_the_internet_are_public() {
        assert_eq!(RANGES.len(), SPECIAL.len());
        for public in ["1.1.1.1", "172.32.0.1", "2606:4700::1111", "64:ff9b::101:101"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for special in [
            "127.0.0.1",
            "169.254.169.254",
            "10.1.2.3",
            "0.0.0.0",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
        ] {
            assert!(!is_public(special.parse().unwrap()), "{special}");
        }
    }
}
