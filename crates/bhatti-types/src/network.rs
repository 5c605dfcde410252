//! Network access of a sandbox.

use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::{Ipv4Net, PrefixLenError};

/// Ranges that no sandbox reaches, regardless of its allowance: this host's own addresses,
/// link-local with the clouds' metadata, multicast, and the address through which one cloud's
/// hosts talk to their machines.
pub const NEVER_REACHED: [Ipv4Net; 5] = [
    range([0, 0, 0, 0], 8),
    range([127, 0, 0, 0], 8),
    range([169, 254, 0, 0], 16),
    range([224, 0, 0, 0], 4),
    range([168, 63, 129, 16], 32),
];

/// Maximum of ranges in one sandbox's allowance.
const ALLOWED_MAX: usize = 64;

const fn range([a, b, c, d]: [u8; 4], bits: u8) -> Ipv4Net {
    let address = Ipv4Addr::new(a, b, c, d);
    match Ipv4Net::new(address, bits) {
        Ok(range) => range,
        Err(PrefixLenError) => panic!("a prefix has at most 32 bits"),
    }
}

/// How a sandbox is connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// The sandbox has no network card.
    #[default]
    None,
    /// The sandbox reaches its siblings and, through this host, the world. Only its siblings and
    /// this host can open connections to it.
    Nat,
}

impl NetworkMode {
    /// Returns the mode's name in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Nat => "nat",
        }
    }
}

/// A name that is not a network mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown network mode `{0}`: expected `nat` or `none`")]
pub struct UnknownNetworkMode(String);

impl FromStr for NetworkMode {
    type Err = UnknownNetworkMode;

    fn from_str(text: &str) -> Result<Self, UnknownNetworkMode> {
        match text {
            "none" => Ok(Self::None),
            "nat" => Ok(Self::Nat),
            _ => Err(UnknownNetworkMode(text.chars().take(64).collect())),
        }
    }
}

/// Ranges that cannot be allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAllowance {
    /// A text is not an IPv4 range.
    #[error("`{0}` is not an IPv4 range such as 192.168.1.0/24")]
    Syntax(String),
    /// No sandbox may reach the range.
    #[error(
        "{0} cannot be allowed: it is reserved for this host or its cloud, link-local or multicast"
    )]
    Never(Ipv4Net),
    /// There are too many ranges.
    #[error("{0} ranges are too many: at most {ALLOWED_MAX} can be allowed")]
    TooMany(usize),
}

/// Ranges that a sandbox may reach beyond those that all sandboxes may, in order and without
/// overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowance(Vec<Ipv4Net>);

impl Allowance {
    /// Parses ranges. A single address is a range of one address.
    ///
    /// # Errors
    ///
    /// Returns an error for the first range that cannot be allowed.
    pub fn parse<T: AsRef<str>>(ranges: &[T]) -> Result<Self, InvalidAllowance> {
        if ranges.len() > ALLOWED_MAX {
            return Err(InvalidAllowance::TooMany(ranges.len()));
        }
        let range = |text: &T| {
            let text = text.as_ref();
            let alone = || text.parse::<Ipv4Addr>().map(Ipv4Net::from).ok();
            let range: Option<Ipv4Net> = text.parse().ok().or_else(alone);
            let syntax = || InvalidAllowance::Syntax(text.chars().take(64).collect());
            let range = range.ok_or_else(syntax)?.trunc();
            match NEVER_REACHED.iter().any(|never| never.contains(&range)) {
                true => Err(InvalidAllowance::Never(range)),
                false => Ok(range),
            }
        };
        let ranges: Vec<Ipv4Net> = ranges.iter().map(range).collect::<Result<_, _>>()?;
        Ok(Self(Ipv4Net::aggregate(&ranges)))
    }

    /// The ranges.
    #[must_use]
    pub fn ranges(&self) -> &[Ipv4Net] {
        &self.0
    }

    /// The ranges as text.
    #[must_use]
    pub fn to_texts(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }

    /// Returns the first of these ranges that is not wholly within a range of `others`.
    #[must_use]
    pub fn first_outside(&self, others: &Self) -> Option<Ipv4Net> {
        let is_inside = |range: &Ipv4Net| others.0.iter().any(|other| other.contains(range));
        self.0.iter().copied().find(|range| !is_inside(range))
    }
}

/// A sandbox's network as requested.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkSpec {
    /// How the sandbox is connected.
    pub mode: NetworkMode,
    /// Ranges that the sandbox may reach beyond those that all sandboxes may.
    pub allow: Allowance,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_are_merged_and_an_address_is_a_range() {
        let allowed = Allowance::parse(&["10.1.2.9/24", "10.1.0.0/16", "192.168.0.1"]).unwrap();

        assert_eq!(allowed.to_texts(), ["10.1.0.0/16", "192.168.0.1/32"]);
        let within = Allowance::parse(&["10.0.0.0/8"]).unwrap();
        assert_eq!(allowed.first_outside(&within), "192.168.0.1/32".parse().ok());
        assert_eq!(within.first_outside(&within), None);
    }

    #[test]
    fn ranges_that_no_sandbox_reaches_cannot_be_allowed() {
        for never in ["169.254.169.254", "127.0.0.0/8", "239.0.0.1/32", "0.0.0.0/8"] {
            let refused = Allowance::parse(&[never]);
            assert!(matches!(refused, Err(InvalidAllowance::Never(_))), "{never}");
        }
        for syntax in ["", "10.0.0.0/33", "::/0", "x", "10.0.0"] {
            let refused = Allowance::parse(&[syntax]);
            assert!(matches!(refused, Err(InvalidAllowance::Syntax(_))), "{syntax}");
        }
        assert!(Allowance::parse(&["0.0.0.0/0"]).is_ok());
        assert_eq!(Allowance::parse(&["1.1.1.1"; 65]), Err(InvalidAllowance::TooMany(65)));
    }
}
