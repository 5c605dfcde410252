//! Real packets through real bridges and rules, in the test's own network namespace. Guests are
//! namespaces behind a veth pair instead of a tap.

#![expect(clippy::unwrap_used, reason = "a test fails if its setup fails")]

mod connections;
mod place;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use bhatti_net::{
    Host, Instance, Kept, NetError, Network, Obstacle, Plan, PrivateNames, Rules, Upstreams,
    bridge_name, obstacles,
};
use bhatti_testkit::enter_own_network;
use bhatti_types::Allowance;

use place::{Guest, LIMIT, ask_name, ip, nft, port_of};

const WEB: u16 = 8080;

/// Whether this test can run. Reports a skipped test if it cannot.
fn ready(what: &str) -> bool {
    let ready = enter_own_network();
    if !ready {
        bhatti_testkit::skip(what, "a network namespace needs root");
    }
    ready
}

fn network(number: u32) -> Network {
    let subnet = format!("10.213.{number}.0/24").parse().unwrap();
    Network { number, subnet }
}

fn address(network: u32, number: u8) -> Ipv4Addr {
    let network = u8::try_from(network).unwrap();
    Ipv4Addr::new(10, 213, network, number)
}

/// Starts a guest at each of these addresses, named after its last number.
async fn guests(host: &Host, at: &[(u32, u8)]) -> (Plan, Vec<Guest>) {
    let mut plan = Plan::default();
    for (number, place) in at {
        if !plan.networks.contains(&network(*number)) {
            plan.networks.push(network(*number));
        }
        let name = format!("s{place}");
        plan.ports.push(port_of(*number, address(*number, *place), &name, Allowance::default()));
    }
    apply(host, &plan).await.unwrap();
    let mut guests = Vec::new();
    for port in &plan.ports {
        let guest = Guest::start(&port.tap, port.address);
        host.connect(&port.tap, port.network).await.unwrap();
        guest.wait_for_link();
        guests.push(guest);
    }
    (plan, guests)
}

async fn apply(host: &Host, plan: &Plan) -> Result<(), NetError> {
    host.apply(plan.networks.first().map(|network| network.number), || Ok(plan.clone())).await
}

async fn open(instance: u32) -> Host {
    let upstreams = Upstreams::Fixed(vec![Ipv4Addr::LOCALHOST.into()]);
    Host::open(Instance(instance), upstreams, PrivateNames::Denied).await.unwrap()
}

fn at(address: Ipv4Addr) -> SocketAddr {
    SocketAddrV4::new(address, WEB).into()
}

#[tokio::test]
async fn siblings_reach_each_other_and_other_users_do_not_with_and_without_br_netfilter() {
    if !ready("traffic between sandboxes") {
        return;
    }
    let host = open(1).await;
    let (mut plan, guests) = guests(&host, &[(0, 2), (0, 3), (1, 2)]).await;
    let [alice, sibling, bob] = &guests[..] else { panic!("three guests") };
    for guest in &guests {
        guest.serve(WEB);
    }
    let of_bob = network(1).gateway();
    place::serve_here(SocketAddrV4::new(of_bob, WEB));
    // With and without the module that passes bridged packets through the rules for routed ones.
    for filtered in ["1", "0"] {
        let setting = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        if std::fs::write(setting, filtered).is_err() {
            bhatti_testkit::skip("siblings with br_netfilter", "the module is not loaded");
        }
        assert_eq!(alice.get(at(sibling.address)), Ok(alice.address.to_string()));
        assert_eq!(sibling.get(at(alice.address)), Ok(sibling.address.to_string()));
        assert!(alice.get(at(bob.address)).is_err(), "another user's sandbox");
        assert!(bob.get(at(alice.address)).is_err(), "another user's sandbox");
    }
    assert_eq!(bob.get(at(bob.address)), Ok(bob.address.to_string()), "bob's server is up");

    // No allowance gives a sandbox access to another user's network.
    plan.ports[0].allow = Allowance::parse(&["0.0.0.0/0"]).unwrap();
    apply(&host, &plan).await.unwrap();
    assert!(alice.get(at(bob.address)).is_err(), "another user's sandbox was allowed");
    assert!(alice.get(at(of_bob)).is_err(), "another user's gateway was allowed");
    assert!(place::get_here(at(of_bob)).is_ok(), "the server at the gateway is up");
    assert_eq!(alice.get(at(sibling.address)), Ok(alice.address.to_string()));
}

#[tokio::test]
async fn sandbox_reaches_the_world_but_not_this_host_private_ranges_or_metadata() {
    const PRIVATE: [[u8; 4]; 5] =
        [[10, 99, 0, 1], [172, 16, 5, 1], [192, 168, 77, 1], [100, 64, 1, 1], [198, 18, 0, 9]];
    if !ready("destinations of sandboxes") {
        return;
    }
    let host = open(1).await;
    let private = PRIVATE.map(Ipv4Addr::from);
    let metadata = Ipv4Addr::new(169, 254, 169, 254);
    let public = Ipv4Addr::new(203, 0, 113, 1);
    let world = Guest::world(&[&private[..], &[metadata, public]].concat());
    world.serve(WEB);
    let (mut plan, guests) = guests(&host, &[(0, 2), (0, 3)]).await;
    let [guest, other] = &guests[..] else { panic!("two guests") };
    guest.serve(WEB);
    for ours in [world.gateway(), network(0).gateway(), Ipv4Addr::LOCALHOST] {
        place::serve_here(SocketAddrV4::new(ours, WEB));
    }

    let seen = guest.get(at(public));
    assert_eq!(seen, Ok(world.gateway().to_string()), "masqueraded as this host");
    for denied in private.into_iter().chain([metadata]) {
        assert!(place::get_here(at(denied)).is_ok(), "{denied} is up");
        assert!(guest.get(at(denied)).is_err(), "{denied} was reached");
    }
    for ours in [world.gateway(), network(0).gateway()] {
        assert!(place::get_here(at(ours)).is_ok(), "{ours} is up");
        assert!(guest.get(at(ours)).is_err(), "{ours} was reached");
    }
    // No connection comes in from outside, even if the client has a route to the guest.
    assert!(world.get(at(guest.address)).is_err(), "the guest was reached from outside");
    assert!(place::get_here(at(guest.address)).is_ok(), "the guest's server is up");

    // An allowance applies to one sandbox, and never covers this host's own addresses or
    // link-local ones.
    plan.ports[0].allow = Allowance::parse(&["0.0.0.0/0"]).unwrap();
    apply(&host, &plan).await.unwrap();
    for allowed in private {
        assert!(guest.get(at(allowed)).is_ok(), "{allowed} is allowed");
        assert!(other.get(at(allowed)).is_err(), "{allowed} is allowed only to the other sandbox");
    }
    assert!(guest.get(at(metadata)).is_err(), "metadata was reached");
    assert!(guest.get(at(network(0).gateway())).is_err(), "the gateway was reached");
    assert!(guest.get(at(world.gateway())).is_err(), "this host was reached by its own address");

    // With `reach_host`, an allowance also covers this host's own addresses.
    plan.reach_host = true;
    apply(&host, &plan).await.unwrap();
    assert!(guest.get(at(world.gateway())).is_ok(), "this host's own address is in the range");
    assert!(other.get(at(world.gateway())).is_err(), "this host is allowed only to its sibling");
}

#[tokio::test]
async fn tap_drops_forged_sources_and_ipv6() {
    if !ready("forged sources") {
        return;
    }
    let host = open(1).await;
    let (_plan, guests) = guests(&host, &[(0, 2), (0, 3), (0, 4)]).await;
    let [forger, victim, witness] = &guests[..] else { panic!("three guests") };
    victim.serve(WEB);
    assert!(forger.get(at(victim.address)).is_ok());

    forger.ip(&["address", "add", "10.213.0.9/24", "dev", "eth0"]);
    let forged = forger.get_from(address(0, 9), at(victim.address));
    assert!(forged.is_err(), "an unassigned address");
    forger.ip(&["address", "add", "10.213.0.4/32", "dev", "eth0"]);
    assert!(forger.get_from(witness.address, at(victim.address)).is_err(), "a sibling's address");
    assert!(witness.get(at(victim.address)).is_ok(), "the witness's own traffic still passes");
    assert!(forger.get_from(forger.address, at(victim.address)).is_ok());

    for guest in [forger, victim] {
        guest.ip(&[
            "address",
            "add",
            &format!("fd00::{}/64", guest.address.octets()[3]),
            "dev",
            "eth0",
            "nodad",
        ]);
    }
    assert!(forger.get("[fd00::3]:8080".parse().unwrap()).is_err(), "IPv6");
    assert!(victim.get("[fd00::3]:8080".parse().unwrap()).is_ok(), "the IPv6 server is up");

    forger.ip(&["link", "set", "eth0", "address", "06:62:0a:d5:00:04"]);
    assert!(forger.get_from(forger.address, at(victim.address)).is_err(), "a forged link address");
}

#[tokio::test]
async fn frames_addressed_to_the_bridge_do_not_reach_this_host() {
    if !ready("frames for bridges") {
        return;
    }
    let host = open(1).await;
    let (plan, guests) = guests(&host, &[(0, 2), (0, 3)]).await;
    let [guest, sibling] = &guests[..] else { panic!("two guests") };
    for interface in ["all".to_owned(), plan.ports[0].tap.clone()] {
        std::fs::write(format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter"), "0").unwrap();
    }
    let gateway = network(0).gateway();
    let here = std::net::UdpSocket::bind((gateway, 9999)).unwrap();
    here.set_read_timeout(Some(LIMIT)).unwrap();
    // Use a link address whose frames a bridge does not forward, and that none of its rules see.
    let neighbour = format!("{gateway}");
    guest.ip(&["neigh", "replace", &neighbour, "lladdr", "01:80:c2:00:00:0e", "dev", "eth0"]);

    guest.send_datagram(gateway, 9999);

    let mut buffer = [0; 16];
    assert!(here.recv_from(&mut buffer).is_err(), "the datagram was delivered");
    // Only the rules keep the datagram out.
    nft(&["flush", "ruleset"]);
    guest.send_datagram(gateway, 9999);
    assert!(here.recv_from(&mut buffer).is_ok(), "the datagram arrives without the rules");
    assert_eq!(host.check_rules().await.unwrap(), Rules::Changed, "the missing rules are noticed");
    apply(&host, &plan).await.unwrap();
    assert_eq!(host.check_rules().await.unwrap(), Rules::Intact);
    for family in ["inet", "bridge", "arp"] {
        let ours = nft(&["list", "tables", family]);
        let ours = ours.split_whitespace().last().unwrap();
        nft(&["flush", "table", family, ours]);
        assert_eq!(host.check_rules().await.unwrap(), Rules::Changed, "table of {family}");
        apply(&host, &plan).await.unwrap();
        assert_eq!(host.check_rules().await.unwrap(), Rules::Intact);
    }
    assert!(sibling.get(at(gateway)).is_err());

    // A tap that is disconnected, or whose network is removed, carries no packets.
    sibling.serve(WEB);
    guest.ip(&["neigh", "flush", "all"]);
    assert!(guest.get(at(sibling.address)).is_ok());
    host.disconnect(&plan.ports[1].tap).await.unwrap();
    assert!(guest.get(at(sibling.address)).is_err());
    apply(&host, &Plan::default()).await.unwrap();
    let left = ip(&["-brief", "link", "show", "dev", &plan.ports[0].tap]);
    assert!(left.contains("DOWN"), "{left}");
}

#[tokio::test]
async fn reused_address_is_reachable_at_once() {
    if !ready("reused addresses") {
        return;
    }
    let host = open(1).await;
    let (mut plan, mut guests) = guests(&host, &[(0, 2), (0, 3)]).await;
    let sibling = guests.remove(0);
    for life in 0..10 {
        guests[0].serve(WEB);
        assert!(sibling.get(at(address(0, 3))).is_ok(), "life {life}");
        guests.remove(0).end();
        plan.ports[1] = port_of(0, address(0, 3), &format!("life{life}"), Allowance::default());
        apply(&host, &plan).await.unwrap();
        let guest = Guest::start(&plan.ports[1].tap, plan.ports[1].address);
        host.connect(&plan.ports[1].tap, 0).await.unwrap();
        guest.wait_for_link();
        guests.push(guest);
    }
}

#[tokio::test]
async fn full_network_has_253_sandboxes_and_applying_it_twice_changes_nothing() {
    if !ready("a full network") {
        return;
    }
    let host = open(1).await;
    let ports = (2..=254).map(|number| {
        let name = format!("s{number}");
        port_of(0, address(0, number), &name, Allowance::default())
    });
    let mut plan = Plan { networks: vec![network(0)], ports: ports.collect(), reach_host: false };
    apply(&host, &plan).await.unwrap();
    let (first, last) = (
        Guest::start(&plan.ports[0].tap, address(0, 2)),
        Guest::start(&plan.ports[252].tap, address(0, 254)),
    );
    for port in [0, 252] {
        host.connect(&plan.ports[port].tap, 0).await.unwrap();
    }
    first.wait_for_link();
    last.wait_for_link();
    last.serve(WEB);
    let there = || (nft(&["list", "ruleset"]), ip(&["-brief", "address"]), ip(&["route"]));
    // Ignore counters, which count packets that were dropped meanwhile.
    let plain = |ruleset: String| -> Vec<String> {
        ruleset.lines().filter(|line| !line.contains("counter")).map(str::to_owned).collect()
    };
    let before = there();

    apply(&host, &plan).await.unwrap();

    let after = there();
    assert_eq!(plain(before.0), plain(after.0));
    assert_eq!((before.1, before.2), (after.1, after.2));
    assert!(first.get(at(last.address)).is_ok());
    plan.ports.truncate(1);
    apply(&host, &plan).await.unwrap();
    assert!(first.get(at(last.address)).is_err(), "the address belongs to no sandbox any more");
}

#[tokio::test]
async fn adding_a_sandbox_keeps_the_tables_and_repairs_foreign_changes() {
    if !ready("added rules") {
        return;
    }
    let host = open(1).await;
    let port = |number: u8, allow: &[&str]| {
        let name = format!("s{number}");
        port_of(0, address(0, number), &name, Allowance::parse(allow).unwrap())
    };
    let tables = || {
        let all = nft(&["-a", "list", "ruleset"]);
        all.lines().filter(|line| line.starts_with("table")).map(str::to_owned).collect::<Vec<_>>()
    };
    let has = |what: &str| nft(&["list", "ruleset"]).contains(what);
    let mut plan =
        Plan { networks: vec![network(0)], ports: vec![port(2, &[])], reach_host: false };
    apply(&host, &plan).await.unwrap();
    let first = tables();
    assert_eq!(first.len(), 3);

    plan.ports.push(port(3, &["192.0.2.0/24"]));
    apply(&host, &plan).await.unwrap();

    assert_eq!(tables(), first, "the same tables, with more elements");
    assert!(has(&plan.ports[1].tap) && has("10.213.0.3 . 192.0.2.0/24"));

    // The allowance of a port is replaced, not only extended.
    plan.ports[1] = port(3, &["198.51.100.0/24"]);
    apply(&host, &plan).await.unwrap();
    assert!(has("10.213.0.3 . 198.51.100.0/24") && !has("192.0.2.0/24"));

    nft(&["flush", "ruleset"]);
    plan.ports.push(port(4, &[]));
    apply(&host, &plan).await.unwrap();
    assert!(plan.ports.iter().all(|port| has(&port.tap)), "a port is missing after the flush");

    apply(&host, &Plan::default()).await.unwrap();
    assert_eq!(tables(), [""; 0]);
    nft(&["add", "table", "inet", "bhatti_00000001"]);
    nft(&["add", "chain", "inet", "bhatti_00000001", "stray"]);
    apply(&host, &plan).await.unwrap();
    assert!(has(&plan.ports[0].tap) && !has("stray"));
}

#[tokio::test]
async fn concurrent_changes_are_applied_together_and_each_is_in_force_afterwards() {
    if !ready("concurrent changes") {
        return;
    }
    let host = open(1).await;
    let plans = std::sync::Mutex::new((0, Plan { networks: vec![network(0)], ..Plan::default() }));
    let changes = (2..22).map(|number| {
        let (host, plans) = (&host, &plans);
        async move {
            let name = format!("s{number}");
            let port = port_of(0, address(0, number), &name, Allowance::default());
            plans.lock().unwrap().1.ports.push(port.clone());
            let changed = host.apply(Some(0), || {
                let mut plans = plans.lock().unwrap();
                plans.0 += 1;
                Ok::<_, NetError>(plans.1.clone())
            });
            changed.await.unwrap();
            assert!(nft(&["list", "ruleset"]).contains(&port.tap), "{name}");
        }
    });

    futures_util::future::join_all(changes).await;

    let read = plans.lock().unwrap().0;
    assert!(read <= 3, "{read} plans were read for twenty concurrent changes");
}

#[tokio::test]
async fn daemons_on_one_host_leave_each_other_and_foreign_networks_alone() {
    if !ready("two daemons on one host") {
        return;
    }
    let (one, two) = (open(1).await, open(2).await);
    nft(&["add", "table", "inet", "foreign"]);
    ip(&["link", "add", "bhatti5", "type", "bridge"]);
    ip(&["link", "add", "tap0", "type", "veth", "peer", "name", "tap1"]);
    ip(&["link", "set", "tap0", "up"]);
    ip(&["route", "add", &network(7).subnet.to_string(), "dev", "tap0"]);
    ip(&["route", "add", "default", "dev", "tap0"]);
    let (plan, first) = guests(&one, &[(0, 2), (0, 3)]).await;
    first[1].serve(WEB);
    let alone = nft(&["list", "ruleset"]);

    assert!(two.taken().await.unwrap().holds(&network(0)), "the other daemon has this range");
    assert!(two.taken().await.unwrap().holds(&network(5)), "a foreign bridge");
    assert!(two.taken().await.unwrap().holds(&network(7)), "a foreign range");
    assert!(!two.taken().await.unwrap().holds(&network(8)), "a default route takes no range");
    assert!(!one.taken().await.unwrap().holds(&network(0)), "the network is this daemon's own");
    let (_, second) = guests(&two, &[(1, 2), (1, 3)]).await;
    second[1].serve(WEB);
    assert!(first[0].get(at(first[1].address)).is_ok());
    assert!(second[0].get(at(second[1].address)).is_ok());
    assert!(first[0].get(at(second[1].address)).is_err(), "the sandbox belongs to another daemon");
    for (number, taken) in [(0, "bhatti0"), (5, "bhatti5")] {
        let foreign = Plan { networks: vec![network(number)], ..Plan::default() };
        let refused = apply(&two, &foreign).await;
        assert!(matches!(&refused, Err(NetError::Taken { name }) if name == taken), "{refused:?}");
    }
    apply(&two, &Plan::default()).await.unwrap();

    assert_eq!(nft(&["list", "ruleset"]).lines().count(), alone.lines().count());
    let links = ip(&["-brief", "link"]);
    assert!(!links.contains(&bridge_name(1)), "{links}");
    for kept in ["bhatti0", "bhatti5", "tap0"] {
        assert!(links.contains(kept), "{kept}: {links}");
    }
    assert!(first[0].get(at(first[1].address)).is_ok(), "the first daemon's sandboxes still work");

    // The next daemon with the same data directory takes up the existing network, and removes
    // everything that its plan does not have.
    drop(one);
    let next = open(1).await;
    apply(&next, &plan).await.unwrap();
    assert!(first[0].get(at(first[1].address)).is_ok());
    apply(&next, &Plan::default()).await.unwrap();
    assert_eq!(nft(&["list", "ruleset"]).trim(), "table inet foreign {\n}");
    assert!(!ip(&["-brief", "link"]).contains("bhatti0"));
}

#[tokio::test]
async fn siblings_resolve_locally_and_other_names_upstream() {
    if !ready("names") {
        return;
    }
    let host = open(1).await;
    let (mut plan, guests) = guests(&host, &[(0, 2), (0, 3), (1, 9)]).await;
    place::serve_names_here("example.com", Ipv4Addr::new(203, 0, 113, 7));
    let (guest, gateway) = (&guests[0], network(0).gateway());

    for by_connection in [false, true] {
        let ask = |name| ask_name(guest, gateway, name, by_connection);
        assert_eq!(ask("s3").await, Ok(vec![address(0, 3)]));
        assert_eq!(ask("S3.sb").await, Ok(vec![address(0, 3)]));
        assert_eq!(ask("s9.sb").await, Err("NameError".to_owned()), "a sandbox of another user");
        assert_eq!(ask("example.com").await, Ok(vec![Ipv4Addr::new(203, 0, 113, 7)]));
        assert_eq!(ask("elsewhere.org").await, Err("NameError".to_owned()));
    }
    plan.ports[1].name = "renamed".to_owned();
    host.rename(&plan);
    assert_eq!(ask_name(guest, gateway, "renamed", false).await, Ok(vec![address(0, 3)]));
    assert_eq!(ask_name(guest, gateway, "s3.sb", false).await, Err("NameError".to_owned()));
}

#[tokio::test]
async fn failing_upstream_is_skipped_for_one_that_answers() {
    if !ready("a failing upstream") {
        return;
    }
    let servers = [Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::LOCALHOST].map(Into::into).to_vec();
    let host = Host::open(Instance(1), Upstreams::Fixed(servers), PrivateNames::Denied);
    let host = host.await.unwrap();
    let (_plan, guests) = guests(&host, &[(0, 2)]).await;
    place::serve_failures_here(Ipv4Addr::new(127, 0, 0, 2));
    place::serve_names_here("example.com", Ipv4Addr::new(203, 0, 113, 7));

    let ask = |name| ask_name(&guests[0], network(0).gateway(), name, false);
    assert_eq!(ask("example.com").await, Ok(vec![Ipv4Addr::new(203, 0, 113, 7)]));
    assert_eq!(ask("elsewhere.org").await, Err("NameError".to_owned()));
    assert_eq!(ask("printer").await, Err("NameError".to_owned()));
}

#[tokio::test]
async fn other_firewalls_that_drop_by_default_are_reported_until_they_allow_sandboxes() {
    const FILTERS: &str = "table ip filter {
        chain USER { }
        chain FORWARD { type filter hook forward priority filter; policy drop; jump USER; }
        chain INPUT { type filter hook input priority filter; policy drop; }
        chain OUTPUT { type filter hook output priority filter; policy drop; }
    }
    table inet host {
        chain input { type filter hook input priority filter; policy drop; }
        chain forward { type filter hook forward priority filter; policy accept; }
    }
    table ip6 filter {
        chain FORWARD { type filter hook forward priority filter; policy drop; }
    }";
    if !ready("other firewalls") {
        return;
    }
    let host = open(1).await;
    guests(&host, &[(0, 2)]).await;
    assert_eq!(obstacles().await.unwrap(), []);

    nft(&[FILTERS]);
    let found = obstacles().await.unwrap();

    let of = |table: &str, chain: &str, kept| Obstacle {
        table: table.to_owned(),
        chain: chain.to_owned(),
        kept,
    };
    let world = of("ip filter", "FORWARD", Kept::World);
    let names = of("ip filter", "INPUT", Kept::Names);
    assert_eq!(found, [world, names.clone(), of("inet host", "input", Kept::Names)]);

    // Docker has a chain for such rules. Letting sandboxes out through this host does not let
    // them reach its resolver.
    nft(&["insert rule inet host input iifname bhatti0 accept"]);
    nft(&["insert rule ip filter USER iifname bhatti* accept"]);
    assert_eq!(obstacles().await.unwrap(), [names]);
}
