//! Firewall rules of all networks, as a script for nft(8).
//!
//! ```text
//!  tap ─► bridge prerouting: IPv4 and ARP from the sandbox's own addresses, or dropped
//!           ├─► another tap of the same bridge: passes
//!           ├─► this host:   DNS to the network's resolver, allowed ranges, or refused
//!           └─► elsewhere:   other networks are refused, allowed ranges pass,
//!                            private ranges are refused, the rest passes, masqueraded
//!  elsewhere ─► tap: answers, or dropped
//! ```
//!
//! The rules identify taps by their group, which is the daemon's own number. A tap that belongs
//! to no sandbox of the plan passes nothing.
//!
//! Frames that are addressed to the bridge itself (`01:80:c2:00:00:0x`) bypass the hooks of the
//! bridge and come in from the tap, as do all frames from a tap that is not a port. This host
//! drops all of them.
//!
//! There are three tables, of the families `bridge`, `inet` and `arp`, in the daemon's own name.
//! One transaction either declares them whole or changes their sets, so half a policy is never in
//! force. We do not touch other chains; what those drop stays dropped.
//!
//! **Epochs.** A connection carries a mark: the *epoch* of its sandbox, a number that no other
//! sandbox has. The rules accept an established connection only if its mark is the current epoch
//! of the address. So a connection no longer passes if it was opened while the rules were gone,
//! or by the sandbox that had the address before.

use std::net::Ipv4Addr;

use bhatti_types::NEVER_REACHED;

use crate::names::{Instance, Mac, bridge_name};
use crate::{Network, Plan, Port};

/// Ranges that are not assigned on the public internet, and so may be in use on networks around
/// this host.
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

/// Maximum of connections that one sandbox may have open through this host, and of name lookups
/// beside them: all sandboxes share the host's connection table.
const CONNECTIONS_MAX: u32 = 4096;
const LOOKUPS_MAX: u32 = 1024;

/// The sets to which packets add elements.
const COUNTING: [&str; 2] = ["flows", "lookups"];

/// Returns the name of the daemon's tables, the same for all families.
fn table(instance: Instance) -> String {
    format!("bhatti_{instance}")
}

/// Returns this daemon's tables from a listing of all rules, without the parts that packets
/// change: the elements of the sets that count connections.
pub(crate) fn declared_part(instance: Instance, ruleset: &str) -> String {
    let tables = FAMILIES.map(|family| format!("table {family} {} {{", table(instance)));
    let (mut is_ours, mut is_counting) = (false, false);
    let kept = ruleset.lines().filter(|line| {
        if line.starts_with("table ") {
            is_ours = tables.iter().any(|table| table == line);
        } else if line.starts_with("\tset ") {
            is_counting = COUNTING.iter().any(|set| *line == format!("\tset {set} {{"));
        } else if *line == "\t}" {
            is_counting = false;
        }
        // The list of elements may take several lines.
        let is_element = line.starts_with("\t\telements") || line.starts_with("\t\t\t");
        is_ours && !(is_counting && is_element)
    });
    kept.flat_map(|line| [line, "\n"]).collect()
}

/// Returns a script that declares all tables of `plan`, regardless of the existing ones. A plan
/// without networks has no tables.
pub(crate) fn script(instance: Instance, plan: &Plan) -> String {
    let table = table(instance);
    let mut script = String::new();
    for family in FAMILIES {
        // Deleting a missing table fails, so declare it first.
        script += &format!("table {family} {table} {{}}\ndelete table {family} {table}\n");
    }
    script + &tables(instance, &table, plan)
}

/// Returns a script that turns the tables of `before` into those of `plan`. It does not replace
/// the tables, so connection counts are kept. The script fails if the tables do not match
/// `before`.
///
/// Returns `None` if the tables have to be declared as a whole, and an empty script if nothing
/// changes.
pub(crate) fn change(instance: Instance, before: &Plan, plan: &Plan) -> Option<String> {
    if plan.networks.is_empty() {
        return None;
    }
    let table = table(instance);
    if before.networks.is_empty() {
        let created = FAMILIES.map(|family| format!("create table {family} {table}\n"));
        return Some(created.concat() + &tables(instance, &table, plan));
    }
    if before.reach_host != plan.reach_host {
        return None;
    }
    let mut script = String::new();
    for (was, is) in elements(before).into_iter().zip(elements(plan)) {
        let Elements { family, set, .. } = is;
        let gone: Vec<_> = was.elements.iter().filter(|one| !is.elements.contains(one)).collect();
        let new: Vec<_> = is.elements.iter().filter(|one| !was.elements.contains(one)).collect();
        for (verb, changed) in [("delete", gone), ("add", new)] {
            if !changed.is_empty() {
                let changed: Vec<&str> = changed.into_iter().map(String::as_str).collect();
                let changed = changed.join(", ");
                script += &format!("{verb} element {family} {table} {set} {{ {changed} }}\n");
            }
        }
    }
    Some(script)
}

/// The elements of a set that depend on the plan.
struct Elements {
    family: &'static str,
    set: &'static str,
    kind: &'static str,
    flags: &'static str,
    elements: Vec<String>,
}

/// All sets that depend on a plan, always in the same order.
fn elements(plan: &Plan) -> [Elements; 8] {
    let Plan { networks, ports, reach_host: _ } = plan;
    let bridge = |network: &Network| quoted(&bridge_name(network.number));
    let of_networks = |element: &dyn Fn(&Network) -> String| networks.iter().map(element).collect();
    let of_ports = |element: &dyn Fn(&Port) -> String| ports.iter().map(element).collect();
    let inet = |set, kind, flags, elements| Elements { family: "inet", set, kind, flags, elements };
    [
        // The addresses that sandboxes may send from.
        Elements {
            family: "bridge",
            set: "sources",
            kind: "type ifname . ether_addr . ipv4_addr",
            flags: "",
            elements: of_ports(&|Port { tap, address, .. }| {
                format!("{} . {} . {address}", quoted(tap), Mac::of_guest(*address))
            }),
        },
        inet("bridges", "type ifname", "", of_networks(&bridge)),
        // If the br_netfilter module passes bridged packets through the hooks for routed packets,
        // traffic between siblings matches here.
        inet(
            "same",
            "type ifname . ifname",
            "",
            of_networks(&|network| format!("{0} . {0}", bridge(network))),
        ),
        inet(
            "gateways",
            "type ifname . ipv4_addr",
            "",
            of_networks(&|network| format!("{} . {}", bridge(network), network.gateway())),
        ),
        inet(
            "networks",
            "type ipv4_addr",
            INTERVAL,
            of_networks(&|network| network.subnet.to_string()),
        ),
        // The ranges that a sandbox reaches beyond those that all sandboxes do.
        inet(
            "allowed",
            "type ipv4_addr . ipv4_addr",
            INTERVAL,
            ports
                .iter()
                .flat_map(|port| {
                    let ranges = port.allow.ranges().iter();
                    ranges.map(|range| format!("{} . {range}", port.address))
                })
                .collect(),
        ),
        inet(
            "epochs",
            "type ipv4_addr : mark",
            "",
            of_ports(&|Port { address, epoch, .. }| format!("{address} : {epoch:#010x}")),
        ),
        inet(
            "current",
            "type ipv4_addr . mark",
            "",
            of_ports(&|Port { address, epoch, .. }| format!("{address} . {epoch:#010x}")),
        ),
    ]
}

fn tables(instance: Instance, table: &str, plan: &Plan) -> String {
    if plan.networks.is_empty() {
        return String::new();
    }
    bridge_table(instance, table, plan)
        + &inet_table(instance, table, plan)
        + &arp_table(instance, table)
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
        sets_of("bridge", plan),
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

/// Declares the sets of a family that depend on the plan.
fn sets_of(family: &str, plan: &Plan) -> String {
    let of_family = elements(plan).into_iter().filter(|elements| elements.family == family);
    let declared = of_family.map(|Elements { set: name, kind, flags, elements, .. }| {
        let keyword = if kind.contains(" : ") { "map" } else { "set" };
        declared(keyword, name, kind, flags, &elements)
    });
    declared.collect()
}

/// Declares the other sets: ranges that are never reached, ranges that only allowed sandboxes
/// reach, and counters.
fn fixed_sets() -> String {
    let counting = COUNTING.map(|set| {
        format!("\tset {set} {{\n\t\ttype ipv4_addr\n\t\tsize 65535\n\t\tflags dynamic\n\t}}\n")
    });
    let never = NEVER_REACHED.map(|range| range.to_string()).to_vec();
    let private = PRIVATE.map(str::to_owned).to_vec();
    [
        declared("set", "never", "type ipv4_addr", INTERVAL, &never),
        declared("set", "private", "type ipv4_addr", INTERVAL, &private),
        counting.concat(),
    ]
    .concat()
}

fn inet_table(instance: Instance, table: &str, plan: &Plan) -> String {
    let sets = sets_of("inet", plan) + &fixed_sets();
    let to_this_host =
        if plan.reach_host { "\t\tip saddr . ip daddr @allowed accept\n" } else { "" };
    format!(
        "table inet {table} {{
{sets}	chain bypass {{
		type filter hook prerouting priority raw; policy accept;
		iifgroup {instance} drop
	}}
	chain stamp {{
		type filter hook prerouting priority mangle; policy accept;
		iifname @bridges ct state new ct mark set ip saddr map @epochs
	}}
	chain stamp_output {{
		type route hook output priority mangle; policy accept;
		oifname @bridges ct state new ct mark set ip daddr map @epochs
	}}
	chain input {{
		type filter hook input priority filter - 10; policy accept;
		iifname @bridges goto to_host
	}}
	chain to_host {{
		ct state established,related ip saddr . ct mark @current accept
		ct state != new drop
		iifname . ip daddr @gateways meta l4proto {{ tcp, udp }} th dport 53 goto to_resolver
		ip daddr @networks reject with icmpx admin-prohibited
		ip daddr @never reject with icmpx admin-prohibited
		add @flows {{ ip saddr ct count over {CONNECTIONS_MAX} }} reject with icmpx admin-prohibited
{to_this_host}		reject with icmpx admin-prohibited
	}}
	chain to_resolver {{
		add @lookups {{ ip saddr ct count over {LOOKUPS_MAX} }} drop
		accept
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
		ct state established,related ip saddr . ct mark @current accept
		ct state established,related reject with icmpx admin-prohibited
		ip daddr @networks reject with icmpx admin-prohibited
		ip daddr @never reject with icmpx admin-prohibited
		ct state new add @flows {{ ip saddr ct count over {CONNECTIONS_MAX} }} reject with icmpx admin-prohibited
		ip saddr . ip daddr @allowed accept
		ip daddr @private reject with icmpx admin-prohibited
		accept
	}}
	chain to_guest {{
		ct state established,related ip daddr . ct mark @current accept
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

fn declared(keyword: &str, name: &str, kind: &str, flags: &str, elements: &[String]) -> String {
    let mut set = format!("\t{keyword} {name} {{\n\t\t{kind}\n{flags}");
    if !elements.is_empty() {
        set += &format!("\t\telements = {{ {} }}\n", elements.join(", "));
    }
    set + "\t}\n"
}

fn quoted(name: &str) -> String {
    format!("\"{name}\"")
}

impl Network {
    /// Returns this host's own address in the network.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.address(1)
    }

    /// Returns the address with this number in the network.
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
    fn plan_without_networks_declares_no_rules() {
        let script = script(Instance(1), &Plan::default());
        assert!(script.lines().all(|line| line.ends_with("{}") || line.starts_with("delete")));
    }

    #[test]
    fn change_touches_only_elements_that_differ() {
        let (mut before, mut plan) = (Plan::sample(), Plan::sample());
        assert_eq!(change(Instance(1), &before, &plan).as_deref(), Some(""));

        before.ports[0].name = "another".to_owned();
        assert_eq!(change(Instance(1), &before, &plan).as_deref(), Some(""), "rules have no names");
        plan.ports[0].epoch = 9;
        let script = change(Instance(1), &before, &plan).unwrap();
        let lines: Vec<_> = script.lines().map(|line| line.split(' ').nth(4).unwrap()).collect();
        assert_eq!(lines, ["epochs", "epochs", "current", "current"], "{script}");

        plan.reach_host = true;
        assert_eq!(change(Instance(1), &before, &plan), None);
    }

    #[test]
    fn declared_part_omits_elements_that_packets_add() {
        let listing = "table inet another {\n\tset x {\n\t}\n}\ntable inet bhatti_00000001 {\n\tset flows {\n\t\ttype ipv4_addr\n\t\telements = { 10.0.0.1,\n\t\t\t     10.0.0.2 }\n\t}\n\tset never {\n\t\telements = { 10.0.0.3 }\n\t}\n}\n";

        let declared = declared_part(Instance(1), listing);

        assert!(!declared.contains("10.0.0.1") && !declared.contains("10.0.0.2"), "{declared}");
        assert!(declared.contains("10.0.0.3") && declared.contains("flows"), "{declared}");
        assert!(!declared.contains("set x"), "{declared}");
    }
}
