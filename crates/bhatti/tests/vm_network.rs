//! Networks of real guests. Each test runs in its own network namespace, which has all host
//! addresses that the guests reach.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};

use bhatti_testkit::{
    Api, Feature, Serve, TestDaemon, engine_has, enter_own_network, kill_process, named, needs,
    skip, wait_for,
};
use serde_json::{Value, json};

/// An address of the host in a range that sandboxes reach only if their policy allows it.
const PRIVATE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);

/// Script that sends one echo request and waits for the reply.
const PING: &str = "
import os, socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.settimeout(10)
body = struct.pack('!BBHHH', 8, 0, 0, os.getpid() & 0xffff, 1) + b'bhatti'
total = sum(struct.unpack('!%dH' % (len(body) // 2), body))
total = (total >> 16) + (total & 0xffff)
body = body[:2] + struct.pack('!H', ~(total + (total >> 16)) & 0xffff) + body[4:]
s.sendto(body, (socket.gethostbyname(sys.argv[1]), 0))
while True:
    kind = s.recv(2048)[20]
    if kind == 0:
        print('pong')
        break
";

/// Script that connects, keeps the connection, and records its state in `/tmp/held`.
const HOLD: &str = "
import socket, sys, time
s = socket.create_connection((sys.argv[1], 7777))
open('/tmp/held', 'w').write('connected')
try:
    s.recv(1)
    open('/tmp/held', 'w').write('ended')
except OSError as error:
    open('/tmp/held', 'w').write('cut: %s' % error)
";

fn ready(what: &str) -> bool {
    let ready = enter_own_network();
    if !ready {
        skip(what, "a network namespace needs root");
    }
    ready
}

fn here(program: &str, arguments: &[&str]) -> String {
    #[expect(clippy::disallowed_methods, reason = "the program must run in this thread's network")]
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Lists the taps in this test's network namespace.
fn taps() -> String {
    let links = here("ip", &["-brief", "link"]);
    let is_tap = |line: &&str| line.starts_with("bh") && !line.starts_with("bhatti");
    links.lines().filter(is_tap).collect()
}

async fn create(api: &Api, request: &Value) -> Value {
    let created = api.call("POST", "/sandboxes", request).await;
    assert_eq!(created.status, 201, "{}", created.text());
    created.json()
}

async fn post(api: &Api, path: &str, body: &Value) -> Value {
    let answer = api.call("POST", path, body).await;
    assert!(answer.status.is_success(), "{path}: {}", answer.text());
    answer.json()
}

/// Runs a script. Returns what it prints, trimmed, and whether it succeeds.
async fn sh(api: &Api, sandbox: &str, script: &str) -> (String, bool) {
    let ran = api.exec(sandbox, json!({ "cmd": ["sh", "-c", script] })).await;
    (ran["stdout"].as_str().unwrap().trim().to_owned(), ran["exit_code"] == 0)
}

async fn ip_of(api: &Api, sandbox: &str) -> String {
    let row = api.get(&format!("/sandboxes/{sandbox}")).await.json();
    let told = row["ip"].as_str().unwrap().to_owned();
    let (has, _) = sh(api, sandbox, "ip -4 -o addr show dev eth0 | awk '{print $4}'").await;
    assert_eq!(has, format!("{told}/24"), "{sandbox} does not have the address that is listed");
    told
}

/// Starts a server in a sandbox that returns the sandbox's name on port 7777.
async fn serve_name(api: &Api, sandbox: &str) {
    let script =
        "mkdir -p /tmp/www && cd /tmp/www && hostname >name && exec python3 -m http.server 7777";
    let serve = json!({ "cmd": ["sh", "-c", script], "detach": true });
    post(api, &format!("/sandboxes/{sandbox}/exec"), &serve).await;
    let (_, listens) = sh(
        api,
        sandbox,
        "for i in $(seq 300); do curl -s localhost:7777/name && exit; sleep 0.1; done; exit 1",
    )
    .await;
    assert!(listens);
}

async fn name_at(api: &Api, from: &str, at: &str) -> Option<String> {
    let (said, ok) = sh(api, from, &format!("curl -s --max-time 5 http://{at}:7777/name")).await;
    ok.then_some(said)
}

#[tokio::test]
async fn siblings_stay_connected_after_every_restart_and_forks_get_their_own_address() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    if !ready("networks of real guests") {
        return;
    }
    let mut daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    for name in ["one", "two"] {
        let ping = json!([{ "path": "/tmp/ping.py", "content": PING }, { "path": "/tmp/hold.py", "content": HOLD }]);
        create(&api, &json!({ "name": name, "files": ping })).await;
        serve_name(&api, name).await;
    }
    let (one, two) = (ip_of(&api, "one").await, ip_of(&api, "two").await);
    assert_ne!(one, two);

    for (from, to) in [("one", "two"), ("two", "one"), ("one", two.as_str())] {
        let (said, _) = sh(&api, from, &format!("sudo python3 /tmp/ping.py {to}")).await;
        assert_eq!(said, "pong", "{from} to {to}");
    }
    let named = Some("two".to_owned());
    assert_eq!(name_at(&api, "one", "two").await, named);
    let (lookups, _) = sh(&api, "one", "getent hosts one two; cat /etc/hosts").await;
    assert!(lookups.contains(&two) && lookups.contains("localhost one"), "{lookups}");
    let (sixth, _) = sh(&api, "one", "ip -6 -o addr show dev eth0").await;
    assert_eq!(sixth, "", "the guest has an IPv6 address");

    // The network works after a stop and a start, after a kill of the daemon, and after a daemon
    // that saved its sandboxes.
    post(&api, "/sandboxes/two/stop", &json!({})).await;
    assert_eq!(name_at(&api, "one", "two").await, None, "a stopped sandbox answered");
    post(&api, "/sandboxes/two/start", &json!({})).await;
    assert_eq!(name_at(&api, "one", "two").await, named);
    daemon.kill().await;
    daemon.serve().await;
    assert_eq!(name_at(&api, "one", "two").await, named);
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.arguments = vec!["--stop-sandboxes".into()]).await;
    daemon.terminate().await;
    assert!(daemon.all_vmm_pids().is_empty(), "a VMM still runs");
    // The kernel removes a tap a moment after its VMM has ended.
    wait_for("no taps", || taps().is_empty()).await;
    daemon.serve().await;
    assert_eq!(sh(&api, "two", "hostname").await.0, "two", "the command did not wake it");
    assert_eq!(name_at(&api, "one", "two").await, named);
    assert_eq!((ip_of(&api, "one").await, ip_of(&api, "two").await), (one.clone(), two.clone()));

    // A fork gets another address and loses the parent's connections, which the parent keeps.
    let hold = json!({ "cmd": ["python3", "/tmp/hold.py", "one"], "detach": true });
    post(&api, "/sandboxes/two/exec", &hold).await;
    sh(&api, "two", "while ! test -s /tmp/held; do sleep 0.05; done").await;
    post(&api, "/sandboxes/two/fork", &json!({ "name": "heir" })).await;
    let heir = ip_of(&api, "heir").await;
    assert!(heir != one && heir != two, "{heir}");
    assert_eq!(ip_of(&api, "two").await, two, "the parent's address changed");
    assert_eq!(name_at(&api, "one", "two").await, named);
    assert_eq!(name_at(&api, "one", "heir").await, named, "the fork lacks the parent's server");
    assert_eq!(name_at(&api, "heir", "one").await, Some("one".to_owned()));
    let row = api.get("/sandboxes/heir").await.json();
    assert_eq!(row["identity"]["connections"]["result"], "done", "{row}");
    let (held, _) = sh(
        &api,
        "heir",
        "while [ $(cat /tmp/held) = connected ]; do sleep 0.05; done; cat /tmp/held",
    )
    .await;
    assert!(held.starts_with("cut:"), "{held}");
    assert_eq!(sh(&api, "two", "cat /tmp/held").await.0, "connected");
}

/// Whether a sandbox reaches the host at [`PRIVATE`].
async fn reaches_here(api: &Api, sandbox: &str) -> bool {
    let (said, _) = sh(api, sandbox, &format!("curl -s --max-time 5 http://{PRIVATE}:9000/")).await;
    said == "hello"
}

#[tokio::test]
async fn policy_holds_after_every_restart_of_sandbox_and_daemon() {
    if !ready("policies of real guests") {
        return;
    }
    here("ip", &["address", "add", &format!("{PRIVATE}/32"), "dev", "lo"]);
    let listener = TcpListener::bind((PRIVATE, 9000)).unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            drop(connection.unwrap().write_all(b"HTTP/1.0 200 OK\r\n\r\nhello"));
        }
    });
    let config = "network_reach_host: true\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let api = Api::admin(&daemon);
    create(&api, &json!({ "name": "open", "network_allow": ["192.168.77.0/24"] })).await;
    create(&api, &json!({ "name": "shut" })).await;
    let both = async |api: &Api| (reaches_here(api, "open").await, reaches_here(api, "shut").await);
    assert_eq!(both(&api).await, (true, false));

    for name in ["open", "shut"] {
        post(&api, &format!("/sandboxes/{name}/stop"), &json!({})).await;
        post(&api, &format!("/sandboxes/{name}/start"), &json!({})).await;
    }
    assert_eq!(both(&api).await, (true, false), "after a stop and a start");
    if needs(Feature::SavedMemory) {
        for name in ["open", "shut"] {
            let fork = json!({ "name": format!("{name}-fork") });
            post(&api, &format!("/sandboxes/{name}/fork"), &fork).await;
        }
        assert!(reaches_here(&api, "open-fork").await && !reaches_here(&api, "shut-fork").await);
    }
    for name in ["open", "shut"] {
        post(&api, &format!("/sandboxes/{name}/stop"), &json!({})).await;
        post(&api, &format!("/sandboxes/{name}/start"), &json!({ "cold_boot": true })).await;
    }
    assert_eq!(both(&api).await, (true, false), "after a cold boot");

    // The daemon restores lost rules before it runs a sandbox, and in regular checks.
    daemon.kill().await;
    here("nft", &["flush", "ruleset"]);
    daemon.serve().await;
    assert_eq!(both(&api).await, (true, false), "after the daemon's death");
    here("nft", &["flush", "ruleset"]);
    wait_for("the flushed rules to be restored", || {
        here("nft", &["list", "ruleset"]).contains("chain from_guest")
    })
    .await;
    assert_eq!(both(&api).await, (true, false), "after another program's flush");
    here("nft", &["flush", "ruleset"]);
    post(&api, "/sandboxes/shut/stop", &json!({})).await;
    post(&api, "/sandboxes/shut/start", &json!({})).await;
    assert!(!reaches_here(&api, "shut").await, "the rules were not restored before the start");
}

#[tokio::test]
async fn sandbox_is_not_started_if_its_policy_cannot_be_applied() {
    if !ready("policies that cannot be applied") {
        return;
    }
    let config = "ready_vmms: 0\nready_forks: 0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let api = Api::admin(&daemon);
    create(&api, &json!({ "name": "dev" })).await;
    post(&api, "/sandboxes/dev/stop", &json!({})).await;
    // Replaces the daemon's bridge with one that lacks the daemon's mark.
    here("ip", &["link", "delete", "bhatti0"]);
    here("ip", &["link", "add", "bhatti0", "type", "bridge"]);

    for (path, request) in [("/sandboxes/dev/start", json!({})), ("/sandboxes", json!({}))] {
        let answer = api.call("POST", path, &request).await;
        assert_eq!(answer.refusal(), (503, "not_set_up".into()), "{path}");
        let text = answer.text();
        assert!(text.contains("the interface `bhatti0` does not belong to this daemon"), "{text}");
        wait_for("the end of all VMMs", || daemon.all_vmm_pids().is_empty()).await;
    }
    let rows = api.get("/sandboxes").await.json();
    assert_eq!(rows.as_array().map(Vec::len), Some(1), "{rows}");
    assert_eq!((&rows[0]["name"], &rows[0]["status"]), (&json!("dev"), &json!("stopped")));

    here("ip", &["link", "delete", "bhatti0"]);
    post(&api, "/sandboxes/dev/start", &json!({})).await;
    assert_eq!(sh(&api, "dev", "hostname").await.0, "dev");
}

#[tokio::test]
async fn networks_leave_nothing_after_destruction_or_a_crash() {
    if !ready("the removal of networks") {
        return;
    }
    let config = "ready_vmms: 0\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let api = Api::admin(&daemon);
    let there = || (here("ip", &["-brief", "link"]), here("nft", &["list", "ruleset"]));
    let before = there();
    create(&api, &json!({ "name": "dev" })).await;
    assert!(there().0.contains("bhatti0") && there().1.contains("bhatti_"));

    assert_eq!(api.call("DELETE", "/sandboxes/dev", &Value::Null).await.status, 200);
    assert_eq!(there(), before);

    create(&api, &json!({ "name": "dev" })).await;
    let vmm = daemon.vmm_pids()[0];
    daemon.kill().await;
    kill_process(vmm);
    daemon.serve().await;
    assert_eq!(api.get("/sandboxes/dev").await.json()["status"], "failed");
    assert_eq!(api.call("DELETE", "/sandboxes/dev", &Value::Null).await.status, 200);
    assert_eq!(there(), before);

    // The daemon dies after it has inserted the row: before the VM runs, or before the sandbox is
    // complete.
    let step = if engine_has(Feature::SavedMemory) { "running" } else { "inserted" };
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.fault = bhatti_testkit::fault!(format!("daemon:{step}"))).await;
    let died = daemon.client.create(&named("dev")).await;
    assert!(died.is_err(), "the daemon answered");
    daemon.ended().await;
    daemon.serve_with(|serve| serve.fault = None).await;
    assert_eq!(api.get("/sandboxes").await.json(), json!([]));
    assert_eq!(there(), before);
}

#[tokio::test]
async fn sandbox_without_a_network_has_no_card_but_can_be_used_and_published() {
    let config = "public_listen: 127.0.0.1:0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let api = Api::admin(&daemon);
    let created = create(&api, &json!({ "name": "dev", "network": "none" })).await;
    assert_eq!((&created["network"], &created["ip"]), (&json!("none"), &Value::Null));
    assert_eq!(sh(&api, "dev", "ls /sys/class/net").await.0, "lo");

    serve_name(&api, "dev").await;
    assert_eq!(api.get("/sandboxes/dev/proxy/7777/name").await.text(), "dev\n");
    post(&api, "/sandboxes/dev/publish", &json!({ "port": 7777, "alias": "web" })).await;
    let public = Api::tcp(daemon.public_address(), None);
    let answer = public.send("GET", "/name", &[("host", "web.localhost")], "").await;
    assert_eq!(answer.text(), "dev\n");

    if needs(Feature::SavedMemory) {
        post(&api, "/sandboxes/dev/fork", &json!({ "name": "heir" })).await;
        assert_eq!(sh(&api, "heir", "ls /sys/class/net").await.0, "lo");
    }
}

#[tokio::test]
async fn invalid_network_request_is_refused_before_creation() {
    let config = "listen: 127.0.0.1:0\nnetwork: off\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let api = Api::admin(&daemon);
    assert_eq!(api.get("/health").await.json()["network"], "none");
    let refusal =
        async |api: &Api, request: Value| api.call("POST", "/sandboxes", &request).await.refusal();
    let (bad, none) = (400, "bad_request".to_owned());
    for request in [
        json!({ "network": "bridge" }),
        json!({ "network_allow": ["169.254.169.254/32"] }),
        json!({ "network_allow": ["ten"] }),
        json!({ "network": "none", "network_allow": ["10.0.0.0/8"] }),
    ] {
        assert_eq!(refusal(&api, request.clone()).await, (bad, none.clone()), "{request}");
    }
    let unavailable = refusal(&api, json!({ "network": "nat" })).await;
    assert_eq!(unavailable, (503, "not_set_up".to_owned()));
    if enter_own_network() {
        let users = post(&api, "/users", &json!({ "name": "bob" })).await;
        let key = users["api_key"].as_str().map(str::to_owned);
        daemon.terminate().await;
        let config = "listen: 127.0.0.1:0\nnetwork_allowable: [10.9.0.0/16]\n";
        std::fs::write(daemon.data_dir().join("config.yaml"), config).unwrap();
        daemon.serve().await;
        let bob = Api::tcp(daemon.api_address(), key.as_deref());
        let forbidden = refusal(&bob, json!({ "network_allow": ["10.8.0.0/24"] })).await;
        assert_eq!(forbidden, (403, "forbidden".to_owned()));
        let allowed = create(&bob, &json!({ "network_allow": ["10.9.8.0/24"] })).await;
        assert_eq!(allowed["network_allow"], json!(["10.9.8.0/24"]));
        // Another user's sandbox can be reached neither by its address nor by its name.
        create(&api, &json!({ "name": "mine" })).await;
        serve_name(&api, "mine").await;
        let (mine, bobs) = (ip_of(&api, "mine").await, allowed["id"].as_str().unwrap());
        for at in [mine.as_str(), "mine"] {
            assert_eq!(name_at(&bob, bobs, at).await, None, "{at}");
            assert_eq!(name_at(&api, "mine", at).await, Some("mine".to_owned()), "{at}");
        }
        let gone = api.call("DELETE", "/sandboxes/mine", &Value::Null).await;
        assert!(gone.status.is_success(), "{}", gone.text());
    } else {
        skip("`network_allow` of a user", "a network needs root");
    }
    assert_eq!(api.get("/sandboxes").await.json(), json!([]), "a refused request left a sandbox");
}
