//! Connections: how many a sandbox may have, and which of them the rules accept.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::time::Duration;

use bhatti_net::Rules;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::time::timeout;

use crate::place::{Guest, LIMIT, echoes, nft};
use crate::{WEB, apply, at, guests, open, ready};

/// Maximum of connections that a sandbox may have open.
const CONNECTIONS_MAX: usize = 4096;

/// Port at which the world sends bytes all the time.
const TICKS: u16 = 8081;

const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);

#[tokio::test]
async fn connection_limit_survives_changes_of_other_sandboxes() {
    if !ready("the limit of connections") {
        return;
    }
    // This process holds both ends of each connection.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).unwrap();
    let host = open(1).await;
    let world = Guest::world(&[PUBLIC]);
    world.serve_silence(WEB);
    let (mut plan, guests) = guests(&host, &[(0, 2), (0, 3), (1, 2)]).await;
    let mut connections = Vec::new();
    while connections.len() <= CONNECTIONS_MAX
        && let Some(connection) = guests[0].connect(at(PUBLIC))
    {
        connections.push(connection);
    }
    assert_eq!(connections.len(), CONNECTIONS_MAX);

    // Another sandbox goes, and a whole network.
    for left in [2, 1] {
        plan.ports.truncate(left);
        plan.networks.truncate(1);
        apply(&host, &plan).await.unwrap();
        assert!(guests[0].connect(at(PUBLIC)).is_none(), "{left} sandboxes are left");
    }
    assert!(echo_of_a_new_connection(&guests[1]).is_none(), "the sandbox was removed");
    // A connection that ends makes room for another one.
    drop(connections.pop());
    let again = async { while guests[0].connect(at(PUBLIC)).is_none() {} };
    timeout(Duration::from_secs(60), again).await.unwrap();
}

fn echo_of_a_new_connection(guest: &Guest) -> Option<TcpStream> {
    guest.connect(at(PUBLIC)).filter(|connection| echoes(&mut connection.try_clone().unwrap()))
}

/// Opens a connection on which the world sends bytes all the time.
fn ticking(guest: &Guest) -> TcpStream {
    let mut connection = guest.connect(SocketAddrV4::new(PUBLIC, TICKS).into()).unwrap();
    connection.set_read_timeout(Some(LIMIT)).unwrap();
    connection.read_exact(&mut [0]).unwrap();
    connection
}

#[tokio::test]
async fn connection_of_an_earlier_sandbox_with_the_same_address_is_cut() {
    if !ready("connections of an earlier sandbox") {
        return;
    }
    let host = open(1).await;
    let world = Guest::world(&[PUBLIC]);
    world.serve_echo(WEB);
    world.serve_ticks(TICKS);
    let (mut plan, guests) = guests(&host, &[(0, 2), (0, 3)]).await;
    let (mut earlier, mut other) = (ticking(&guests[0]), ticking(&guests[1]));

    plan.ports[0].epoch += 1;
    apply(&host, &plan).await.unwrap();

    // Read the bytes that were already in transit; then no more arrive.
    let mut buffer = vec![0; 4096];
    while let Ok(1..) = earlier.read(&mut buffer) {}
    other.read_exact(&mut buffer).unwrap();
    assert!(echo_of_a_new_connection(&guests[0]).is_some());
}

#[tokio::test]
async fn changed_rules_are_noticed_and_connections_opened_meanwhile_are_cut() {
    if !ready("changed rules") {
        return;
    }
    let host = open(1).await;
    let world = Guest::world(&[PUBLIC, PRIVATE]);
    world.serve_echo(WEB);
    let (plan, guests) = guests(&host, &[(0, 2)]).await;
    let table = nft(&["list", "tables", "inet"]).trim().replace("table ", "");
    let table: Vec<&str> = table.split(' ').collect();
    let nft_in_table = |verb: &[&str], rest: &[&str]| {
        nft(&[verb, &table[..], rest].concat());
    };
    let mut kept = guests[0].connect(at(PUBLIC)).unwrap();
    assert_eq!(host.check_rules().await.unwrap(), Rules::Intact);
    assert!(guests[0].connect(at(PRIVATE)).is_none(), "the range is private");

    // Changes to tables of other owners wake the watch at once, and the check still reports our
    // rules as intact.
    nft(&["add", "table", "inet", "foreign"]);
    timeout(Duration::from_secs(10), host.rules_changed()).await.unwrap().unwrap();
    assert_eq!(host.check_rules().await.unwrap(), Rules::Intact);
    assert!(echoes(&mut kept));

    let flush = || drop(nft(&["flush", "ruleset"]));
    let empty_a_set = || nft_in_table(&["flush", "set"], &["networks"]);
    let empty_a_chain = || nft_in_table(&["flush", "chain"], &["from_guest"]);
    let let_all_pass = || nft_in_table(&["insert", "rule"], &["from_guest", "accept"]);
    let changes: [&dyn Fn(); 4] = [&empty_a_set, &empty_a_chain, &let_all_pass, &flush];
    /// The change that removes all rules.
    const FLUSHED: usize = 3;
    for (number, change) in changes.into_iter().enumerate() {
        change();
        let mut opened = guests[0].connect(at(PRIVATE));

        timeout(Duration::from_secs(10), host.rules_changed()).await.unwrap().unwrap();
        assert_eq!(host.check_rules().await.unwrap(), Rules::Changed, "change {number}");
        apply(&host, &plan).await.unwrap();

        assert_eq!(host.check_rules().await.unwrap(), Rules::Intact, "change {number}");
        if number == FLUSHED {
            let opened = opened.as_mut().expect("without rules the connection can be opened");
            assert!(!echoes(opened), "the connection was opened without rules");
        }
        assert!(guests[0].connect(at(PRIVATE)).is_none(), "change {number}");
        assert!(echo_of_a_new_connection(&guests[0]).is_some(), "change {number}");
    }
}

#[tokio::test]
async fn name_lookups_are_counted_apart_from_connections() {
    if !ready("name lookups and connections") {
        return;
    }
    let host = open(1).await;
    let world = Guest::world(&[PUBLIC]);
    world.serve_echo(WEB);
    let (_plan, guests) = guests(&host, &[(0, 2)]).await;

    // More lookups than the connections that the sandbox may have, each from another source port.
    for _ in 0..CONNECTIONS_MAX + 1000 {
        guests[0].send_datagram(crate::network(0).gateway(), 53);
    }

    assert!(echo_of_a_new_connection(&guests[0]).is_some());
}
