//! What may pass: the rules of all networks, as a script of nft(8).
//!
//! ```text
//!  tap ─► bridge prerouting: the sandbox's own addresses, IPv4 and ARP, or dropped
//!           ├─► another tap of the same bridge: passes
//!           ├─► this host:   the network's resolver, what is allowed, or refused
//!           └─► elsewhere:   other networks are refused, what is allowed passes, private ranges are refused, the rest passes, masqueraded
//!  elsewhere ─► tap: answers, or dropped
//! ```
//!
//! Taps are known by their group, which is the daemon's own number: one that no sandbox of the plan has passes nothing.
//!
//! What is addressed to a bridge itself (`01:80:c2:00:00:0x`) passes none of its hooks, but comes in from the tap, as does all from a tap that is no
//! port: this host hears nothing from there.
//!
//! Three tables, of the families `bridge`, `inet` and `arp`, in the daemon's own name. They are declared whole and replaced in one transaction, or
//! more is added to them in one: at no time is there half a policy. Chains of others are not touched; what they drop stays dropped.

use std::net::Ipv4Addr;

use bhatti_types::NEVER_REACHED;

use crate::names::{Instance, Mac, bridge_name};
use crate::{Network, Plan, Port};

/// Ranges that are nobody's on the public network, and so may be this host's neighbours.
const PRIVATE: [&str; 8] = [
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "192.88.99.0/24",
    "240.0.0.0/4",
];

/// The families of the tables.
const FAMILIES: [&str; 3] = ["bridge", "inet", "arp"];

/// Connections that one sandbox may have open through this host: the table that it keeps them in is everybody's.
const CONNECTIONS_MAX: u32 = 4096;

/// The name of all tables.
fn table(instance: Instance) -> String {
    format!("bhatti_{instance}")
}

/// The first of the tables that a list of all rules that are there does not have, or has with other rules.
pub(crate) fn missing(instance: Instance, there: &str) -> Option<String> {
    // The rules are the same for every plan: what differs is in sets.
    let wanted = tables(instance, &table(instance), &Plan::sample());
    let names = FAMILIES.map(|family| format!("{family} {}", table(instance)));
    names.into_iter().find(|name| number_of_rules(there, name) != number_of_rules(&wanted, name))
}

/// How many rules the chains of a table have: nft lists one a line.
fn number_of_rules(ruleset: &str, table: &str) -> usize {
    let opening = format!("table {table} {{");
    let lines = ruleset.lines().skip_while(|line| *line != opening).take_while(|line| *line != "}");
    let mut in_chain = false;
    let is_rule = |line: &&str| {
        if !line.starts_with("\t\t") {
            in_chain = line.starts_with("\tchain ");
            return false;
        }
        in_chain && !line.starts_with("\t\ttype ")
    };
    lines.filter(is_rule).count()
}

/// All tables as they are to be, whatever is there. Without networks there are none.
pub(crate) fn script(instance: Instance, plan: &Plan) -> String {
    let table = table(instance);
    let mut script = String::new();
    for family in FAMILIES {
        // What is not there cannot be deleted; declaring it first makes sure that it is.
        script += &format!("table {family} {table} {{}}\ndelete table {family} {table}\n");
    }
    script + &tables(instance, &table, plan)
}

/// The same for tables that were made for `before`, if that is less: the kernel takes several times as long to replace tables as to make
/// them. Fails if they are not what they were.
pub(crate) fn addition(instance: Instance, before: &Plan, plan: &Plan) -> Option<String> {
    if plan.networks.is_empty() {
        return None;
    }
    let table = table(instance);
    if before.networks.is_empty() {
        let created = FAMILIES.map(|family| format!("create table {family} {table}\n"));
        return Some(created.concat() + &tables(instance, &table, plan));
    }
    let is_there = |port: &Port| before.ports.iter().any(|there| there.has_rules_of(port));
    let stays = |there: &Port| plan.ports.iter().any(|port| port.has_rules_of(there));
    if before.networks != plan.networks || !before.ports.iter().all(stays) {
        return None;
    }
    let added = || plan.ports.iter().filter(|port| !is_there(port));
    let sets = [("bridge", "sources", sources(added())), ("inet", "allowed", allowed(added()))];
    let lines = sets.into_iter().filter(|(_, _, elements)| !elements.is_empty());
    let script: String = lines
        .map(|(family, set, elements)| {
            format!("add element {family} {table} {set} {{ {} }}\n", elements.join(", "))
        })
        .collect();
    (!script.is_empty()).then_some(script)
}

fn tables(instance: Instance, table: &str, plan: &Plan) -> String {
    if plan.networks.is_empty() {
        return String::new();
    }
    bridge_table(instance, table, plan)
        + &inet_table(instance, table, plan)
        + &arp_table(instance, table)
}

/// The addresses that sandboxes may send from.
fn sources<'a>(ports: impl Iterator<Item = &'a Port>) -> Vec<String> {
    let source = |Port { tap, address, .. }: &Port| {
        format!("{} . {} . {address}", quoted(tap), Mac::of_guest(*address))
    };
    ports.map(source).collect()
}

/// The ranges that they reach beyond what everybody may.
fn allowed<'a>(ports: impl Iterator<Item = &'a Port>) -> Vec<String> {
    let of_port = |port: &'a Port| {
        let ranges = port.allow.ranges().iter();
        ranges.map(|range| format!("{} . {range}", port.address))
    };
    ports.flat_map(of_port).collect()
}

fn bridge_table(instance: Instance, table: &str, plan: &Plan) -> String {
    format!(
        "table bridge {table} {{
{}	chain prerouting {{
		type filter hook prerouting priority -300; policy accept;
		iifgroup {instance} goto from_guest
	}}
	chain from_guest {{
		ether type ip iifname . ether saddr . ip saddr @sources accept
		ether type arp iifname . ether saddr . arp saddr ip @sources iifname . arp saddr ether . arp saddr ip @sources accept
		counter drop
	}}
}}
",
        set("sources", "ifname . ether_addr . ipv4_addr", "", sources(plan.ports.iter())),
        instance = instance.0,
    )
}

fn arp_table(instance: Instance, table: &str) -> String {
    format!(
        "table arp {table} {{
	chain input {{
		type filter hook input priority -300; policy accept;
		iifgroup {instance} drop
	}}
}}
",
        instance = instance.0
    )
}

/// Whom and what the rules are about.
fn inet_sets(plan: &Plan) -> String {
    let bridge = |network: &Network| quoted(&bridge_name(network.number));
    let networks = &plan.networks;
    [
        set("bridges", "ifname", "", networks.iter().map(bridge)),
        // Where a module sends what is bridged through the hooks of what is routed, siblings meet here.
        set(
            "same",
            "ifname . ifname",
            "",
            networks.iter().map(|network| format!("{0} . {0}", bridge(network))),
        ),
        set(
            "gateways",
            "ifname . ipv4_addr",
            "",
            networks.iter().map(|network| format!("{} . {}", bridge(network), network.gateway())),
        ),
        set(
            "networks",
            "ipv4_addr",
            INTERVAL,
            networks.iter().map(|network| network.subnet.to_string()),
        ),
        set("allowed", "ipv4_addr . ipv4_addr", INTERVAL, allowed(plan.ports.iter())),
        set("never", "ipv4_addr", INTERVAL, NEVER_REACHED.map(|range| range.to_string())),
        set("private", "ipv4_addr", INTERVAL, PRIVATE.map(str::to_owned)),
    ]
    .concat()
}

fn inet_table(instance: Instance, table: &str, plan: &Plan) -> String {
    let sets = inet_sets(plan);
    format!(
        "table inet {table} {{
{sets}	set flows {{
		type ipv4_addr
		size 65535
		flags dynamic
	}}
	chain bypass {{
		type filter hook prerouting priority raw; policy accept;
		iifgroup {instance} drop
	}}
	chain input {{
		type filter hook input priority filter - 10; policy accept;
		iifname @bridges goto to_host
	}}
	chain to_host {{
		ct state established,related accept
		ct state new add @flows {{ ip saddr ct count over {CONNECTIONS_MAX} }} reject with icmpx admin-prohibited
		iifname . ip daddr @gateways meta l4proto {{ tcp, udp }} th dport 53 accept
		ip daddr @networks reject with icmpx admin-prohibited
		ip daddr @never reject with icmpx admin-prohibited
		ip saddr . ip daddr @allowed accept
		reject with icmpx admin-prohibited
	}}
	chain forward {{
		type filter hook forward priority filter - 10; policy accept;
		iifname @bridges goto from_guest
		oifname @bridges goto to_guest
	}}
	chain from_guest {{
		iifname . oifname @same accept
		oifname @bridges reject with icmpx admin-prohibited
		meta nfproto != ipv4 drop
		ct state established,related accept
		ip daddr @networks reject with icmpx admin-prohibited
		ip daddr @never reject with icmpx admin-prohibited
		ct state new add @flows {{ ip saddr ct count over {CONNECTIONS_MAX} }} reject with icmpx admin-prohibited
		ip saddr . ip daddr @allowed accept
		ip daddr @private reject with icmpx admin-prohibited
		accept
	}}
	chain to_guest {{
		ct state established,related accept
		drop
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr @networks oifname != @bridges masquerade
	}}
}}
",
        instance = instance.0
    )
}

const INTERVAL: &str = "\t\tflags interval\n";

fn set(name: &str, kind: &str, flags: &str, elements: impl IntoIterator<Item = String>) -> String {
    let elements: Vec<String> = elements.into_iter().collect();
    let mut set = format!("\tset {name} {{\n\t\ttype {kind}\n{flags}");
    if !elements.is_empty() {
        set += &format!("\t\telements = {{ {} }}\n", elements.join(", "));
    }
    set + "\t}\n"
}

fn quoted(name: &str) -> String {
    format!("\"{name}\"")
}

impl Port {
    /// Whether the rules say the same of both: they do not know names.
    fn has_rules_of(&self, other: &Self) -> bool {
        let Self { tap, network, address, name: _, allow } = self;
        (tap, network, address, allow) == (&other.tap, &other.network, &other.address, &other.allow)
    }
}

impl Network {
    /// This host's own address in it.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.address(1)
    }

    /// The address of this number in it.
    #[must_use]
    pub fn address(&self, number: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.subnet.network().octets();
        Ipv4Addr::new(a, b, c, number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_declared_for_nobody() {
        let script = script(Instance(1), &Plan::default());
        assert!(script.lines().all(|line| line.ends_with("{}") || line.starts_with("delete")));
    }
}
