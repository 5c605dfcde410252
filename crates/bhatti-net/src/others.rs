//! Other firewalls: finds their packet filters that drop traffic of sandboxes that our rules let
//! pass.

use std::fmt;

use crate::{NetError, nft};

/// The prefix of our names. A rule of another firewall that lets sandboxes pass contains it.
const OURS: &str = "bhatti";

/// The traffic that another firewall blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// All traffic to destinations outside this host.
    World,
    /// Traffic to the resolver on this host, and so name lookups.
    Names,
}

/// A chain of another firewall that drops packets by default, and has no rules for sandboxes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The table: family and name.
    pub table: String,
    /// The chain's name.
    pub chain: String,
    /// The traffic that it blocks.
    pub kept: Kept,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, chain, kept } = self;
        let kept = match kept {
            Kept::World => "so sandboxes cannot reach anything outside this host",
            Kept::Names => "so sandboxes cannot resolve names",
        };
        write!(f, "chain `{chain}` of table `{table}` drops packets by default, {kept}")
    }
}

/// Returns the chains of other firewalls that block sandboxes. Chains of the legacy `iptables`
/// are invisible here.
///
/// # Errors
///
/// Returns an error if nft cannot list the chains.
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

/// Whether a chain of a table, or a chain that it jumps to, names the bridges of sandboxes. A
/// rule that lets sandboxes pass does.
fn knows_sandboxes(table: &str, chain: &str) -> bool {
    // nft refuses loops of chains, so the recursion ends.
    rules(table, chain).any(|rule| {
        let next = ["jump ", "goto "].iter().find_map(|how| Some(rule.split_once(how)?.1));
        let next = next.and_then(|rest| rest.split_whitespace().next());
        rule.contains(OURS) || next.is_some_and(|next| knows_sandboxes(table, next))
    })
}

/// Returns the rules of a chain, one a line.
fn rules<'a>(table: &'a str, chain: &str) -> impl Iterator<Item = &'a str> {
    let opening = format!("chain {chain} {{");
    let lines = table.lines().map(str::trim).skip_while(move |line| *line != opening);
    lines.skip(1).take_while(|line| *line != "}")
}

/// Returns the chains in a listing that by default drop IPv4 packets that this host forwards or
/// receives.
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
