//! Packet filters of others, which drop what sandboxes send although ours lets it pass.

use std::fmt;

use crate::{NetError, nft};

/// How names of ours begin, where somebody lets them pass.
const OURS: &str = "bhatti";

/// What such a filter keeps from sandboxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// All that is not on this host.
    World,
    /// The resolver on this host, and so names.
    Names,
}

/// A chain of somebody else's that drops what its rules do not know, and whose rules do not know sandboxes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Its table: family and name.
    pub table: String,
    /// Its name.
    pub chain: String,
    /// What it keeps from sandboxes.
    pub kept: Kept,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, chain, kept } = self;
        let kept = match kept {
            Kept::World => "so sandboxes reach nothing outside",
            Kept::Names => "so sandboxes look up no names",
        };
        write!(f, "`{chain}` of the table `{table}` drops what it does not know, {kept}")
    }
}

/// The filters of others that sandboxes do not get past. Those of the legacy `iptables` cannot be seen.
///
/// # Errors
///
/// Returns an error if the packet filter does not say.
pub async fn obstacles() -> Result<Vec<Obstacle>, NetError> {
    let dropping = dropping(&nft(&[], "list chains\n").await?);
    let mut obstacles = Vec::new();
    for obstacle in dropping {
        let table = nft(&[], &format!("list table {}\n", obstacle.table)).await?;
        if !knows_sandboxes(&table, &obstacle.chain) {
            obstacles.push(obstacle);
        }
    }
    Ok(obstacles)
}

/// Whether a chain of a table, or one that its packets come through, names the bridges of sandboxes: whoever lets them pass does.
fn knows_sandboxes(table: &str, chain: &str) -> bool {
    // Chains cannot lead back to themselves: nft refuses that.
    rules(table, chain).any(|rule| {
        let next = ["jump ", "goto "].iter().find_map(|how| Some(rule.split_once(how)?.1));
        let next = next.and_then(|rest| rest.split_whitespace().next());
        rule.contains(OURS) || next.is_some_and(|next| knows_sandboxes(table, next))
    })
}

/// The lines of a chain.
fn rules<'a>(table: &'a str, chain: &str) -> impl Iterator<Item = &'a str> {
    let opening = format!("chain {chain} {{");
    let lines = table.lines().map(str::trim).skip_while(move |line| *line != opening);
    lines.skip(1).take_while(|line| *line != "}")
}

/// The chains of a list that drop IPv4 packets on their way through this host, or to it.
fn dropping(chains: &str) -> Vec<Obstacle> {
    let (mut table, mut chain) = ("", "");
    let mut found = Vec::new();
    for line in chains.lines().map(str::trim) {
        let opened = |kind: &str| line.strip_prefix(kind)?.strip_suffix(" {");
        if let Some(name) = opened("table ") {
            table = name;
        } else if let Some(name) = opened("chain ") {
            chain = name;
        }
        let kept = match line.split_once("type filter hook ") {
            Some((_, rest)) if rest.starts_with("forward ") => Kept::World,
            Some((_, rest)) if rest.starts_with("input ") => Kept::Names,
            _ => continue,
        };
        let is_ours = table.split_whitespace().any(|word| word.starts_with(OURS));
        let sees_it = ["ip ", "inet "].iter().any(|family| table.starts_with(family));
        if line.contains("policy drop") && sees_it && !is_ours {
            found.push(Obstacle { table: table.to_owned(), chain: chain.to_owned(), kept });
        }
    }
    found
}
