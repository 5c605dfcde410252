//! Limits on what one tenant can take from the host and from other tenants, with real VMs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![expect(clippy::print_stderr, reason = "measurements are shown with the test's output")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bhatti_testkit::{
    Api, EndlessLister, Feature, LIMIT, Serve, TestDaemon, needs, resident_mib, vmm_pid,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Command that overwrites a file in place with random bytes, which do not compress.
const REWRITE: &str =
    "dd if=/dev/urandom of=/workspace/file bs=1M count=64 conv=notrunc,fsync status=none";

const TCP: &str = "listen: 127.0.0.1:0\n";

async fn daemon_on_tcp() -> (TestDaemon, Api) {
    let daemon = TestDaemon::start_with(Serve { config: TCP.into(), ..Serve::default() }).await;
    let admin = Api::admin(&daemon);
    (daemon, admin)
}

/// Creates a user with `limits` and returns its client.
async fn user(daemon: &TestDaemon, admin: &Api, name: &str, limits: Value) -> Api {
    let mut request = limits;
    request["name"] = name.into();
    let made = admin.call("POST", "/users", &request).await;
    assert_eq!(made.status, 201, "{}", made.text());
    Api::tcp(daemon.api_address(), made.json()["api_key"].as_str())
}

async fn create(api: &Api, request: Value) -> String {
    let made = api.call("POST", "/sandboxes", &request).await;
    assert_eq!(made.status, 201, "{}", made.text());
    made.json()["id"].as_str().unwrap().to_owned()
}

/// Lists the layers of a sandbox's disk.
fn layers(directory: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|it| it == "qcow2")).collect()
}

#[tokio::test]
async fn disk_limit_bounds_the_snapshots_of_a_rewritten_disk() {
    if !needs(Feature::LayeredDisks) {
        return;
    }
    let (daemon, admin) = daemon_on_tcp().await;
    let limits = json!({ "max_disk_mb": 600, "max_snapshots": 50 });
    let alice = user(&daemon, &admin, "alice", limits).await;
    create(&alice, json!({ "name": "dev", "memory_mb": 256 })).await;
    let directory = daemon.sandbox_directories()[0].clone();

    let mut refused = None;
    for round in 0..12 {
        alice.sh("dev", REWRITE).await;
        let before = layers(&directory).len();
        let name = json!({ "name": format!("s{round}") });
        let answer = alice.call("POST", "/sandboxes/dev/checkpoint", &name).await;
        if answer.status != 201 {
            assert_eq!(layers(&directory).len(), before, "a refused snapshot freezes nothing");
            refused = Some((round, answer));
            break;
        }
    }

    let (rounds, answer) = refused.expect("a snapshot is refused at the disk limit");
    assert!(rounds > 1, "{}", answer.text());
    assert_eq!(answer.refusal(), (403, "quota_exceeded".to_owned()));
    let error = answer.json()["error"].as_str().unwrap().to_owned();
    assert!(error.contains("disk limit") && error.contains("600 MiB"), "{error}");
    assert_eq!(alice.call("POST", "/sandboxes/dev/fork", &json!({})).await.status, 403);
    // The sandbox keeps running, and deleting snapshots frees space.
    assert_eq!(alice.sh("dev", "echo on").await, "on\n");
    for round in 0..rounds {
        let deleted = alice.call("DELETE", &format!("/snapshots/s{round}"), &Value::Null).await;
        assert_eq!(deleted.status, 200, "{}", deleted.text());
    }
    let again = alice.call("POST", "/sandboxes/dev/checkpoint", &json!({ "name": "last" })).await;
    assert_eq!(again.status, 201, "{}", again.text());
}

#[tokio::test]
async fn layers_of_deleted_snapshots_are_merged_at_a_quarter_of_the_disk() {
    if !needs(Feature::LayeredDisks) {
        return;
    }
    let (daemon, admin) = daemon_on_tcp().await;
    create(&admin, json!({ "name": "dev", "memory_mb": 256 })).await;
    let directory = daemon.sandbox_directories()[0].clone();
    // Copies 304 MiB from memory: random bytes would take the emulated processor a minute.
    admin.sh("dev", "head -c 16M /dev/urandom >/dev/shm/piece").await;
    let write = "for i in $(seq 0 18); do dd if=/dev/shm/piece of=/workspace/file bs=16M seek=$i conv=notrunc status=none; done; sync";
    let mut most = 0;
    for _ in 0..6 {
        admin.sh("dev", write).await;
        admin.call("POST", "/sandboxes/dev/checkpoint", &json!({ "name": "s" })).await;
        let deleted = admin.call("DELETE", "/snapshots/s", &Value::Null).await;
        assert_eq!(deleted.status, 200, "{}", deleted.text());
        most = most.max(layers(&directory).len());
    }
    let sum = admin.sh("dev", "sha256sum </workspace/file").await;

    // Six rounds make six layers of 304 MiB each. At 1 GiB, a quarter of the disk, the daemon
    // merges them.
    assert!(most >= 4, "{most} layers");
    assert!(layers(&directory).len() <= 4, "{:?}", layers(&directory));
    admin.call("POST", "/sandboxes/dev/stop", &Value::Null).await;
    admin.call("POST", "/sandboxes/dev/start", &json!({})).await;
    assert_eq!(admin.sh("dev", "sha256sum </workspace/file").await, sum);
}

#[tokio::test]
async fn daemon_listens_while_twenty_guests_hang() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let mut daemon = TestDaemon::start_with(Serve { config: TCP.into(), ..Serve::default() }).await;
    let admin = Api::admin(&daemon);
    let mut creating = JoinSet::new();
    for number in 0..20 {
        let admin = admin.clone();
        let request = json!({ "name": format!("s{number}"), "memory_mb": 128, "keep_hot": true });
        creating.spawn(async move { create(&admin, request).await });
    }
    creating.join_all().await;
    let pids: Vec<Pid> = (daemon.sandbox_directories().iter())
        .filter_map(|directory| Pid::from_raw(i32::try_from(vmm_pid(directory)?).ok()?))
        .collect();
    assert!(pids.len() >= 20);
    for pid in &pids {
        kill_process(*pid, Signal::STOP).unwrap();
    }
    daemon.kill().await;

    let began = Instant::now();
    daemon.listen().await;
    let health = admin.get("/health").await.json();
    eprintln!("answered {} ms after the start: {health}", began.elapsed().as_millis());
    // The daemon cannot adopt a hanging guest, so it answered before it had adopted any. A spare
    // may be counted, too.
    assert!(health["taking_up"].as_u64() >= Some(20), "{health}");
    assert_eq!(admin.get("/sandboxes").await.json().as_array().map(Vec::len), Some(20));

    for pid in &pids {
        kill_process(*pid, Signal::CONT).unwrap();
    }
    let taken_up = async {
        while admin.get("/health").await.json()["taking_up"] != 0 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, taken_up).await.unwrap();
    assert_eq!(admin.sh("s7", "echo alive").await, "alive\n");
}

/// Requests whose responses the client never reads. Dropping this value ends them.
#[derive(Default)]
struct Unread {
    requests: JoinSet<()>,
    statuses: Arc<Mutex<Vec<u16>>>,
}

impl Unread {
    fn begin(
        &mut self,
        api: &Api,
        count: usize,
        (method, path): (&'static str, &'static str),
        accept: &'static str,
        body: &Value,
    ) {
        for _ in 0..count {
            let (api, body, statuses) = (api.clone(), body.to_string(), Arc::clone(&self.statuses));
            self.requests.spawn(async move {
                let headers = [("content-type", "application/json"), ("accept", accept)];
                let answer = api.begin(method, path, &headers, body).await;
                statuses.lock().unwrap().push(answer.status().as_u16());
                // The head has been read; the body stays unread.
                std::future::pending::<()>().await;
                drop(answer);
            });
        }
    }
}

#[tokio::test]
async fn daemon_stays_small_and_serves_others_under_a_hostile_tenant() {
    const SILENT: usize = 8192;
    if !needs(Feature::LayeredDisks) {
        return;
    }
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum }).unwrap();
    let (mut daemon, admin) = daemon_on_tcp().await;
    // The admin makes the hostile requests: the rate limits of other users would refuse most.
    let alice = admin.clone();
    create(&alice, json!({ "name": "hostile", "keep_hot": true })).await;
    let hostile = daemon.sandbox_directories()[0].clone();
    create(&alice, json!({ "name": "dev", "keep_hot": true })).await;
    let links = "import os\nos.mkdir('/workspace/m')\nfor i in range(100000): os.symlink('x' * 1000, f'/workspace/m/{i}')";
    alice.exec("dev", json!({ "cmd": ["python3", "-c", links], "timeout_sec": 200 })).await;
    let lister = EndlessLister::take_over(&hostile);
    daemon.kill().await;
    daemon.serve().await;
    let bob = user(&daemon, &admin, "bob", json!({})).await;
    let before = resident_mib(daemon.pid());
    let endless = alice.get("/sandboxes/hostile/files?path=/&ls=true").await;
    assert_eq!(endless.status, 413, "{}", endless.text());

    let exec = json!({ "cmd": ["head", "-c", "20971520", "/dev/zero"] });
    let mut unread = Unread::default();
    let exec_path = ("POST", "/sandboxes/dev/exec");
    unread.begin(&alice, 150, exec_path, "application/json", &exec);
    unread.begin(&alice, 150, exec_path, "application/x-ndjson", &exec);
    for path in [
        "/sandboxes/dev/files?path=/workspace/m&ls=true",
        "/sandboxes/hostile/files?path=/&ls=true",
    ] {
        unread.begin(&alice, 50, ("GET", path), "application/json", &Value::Null);
    }
    let mut silent = Vec::new();
    while silent.len() < SILENT {
        // Connecting never fails: the listener closes its oldest silent connection.
        silent.push(TcpStream::connect(daemon.api_address()).await.unwrap());
    }
    let (mut most, mut waits) = (before, Vec::new());
    for _ in 0..100 {
        let began = Instant::now();
        assert_eq!(bob.get("/sandboxes").await.status, 200);
        waits.push(began.elapsed());
        most = most.max(resident_mib(daemon.pid()));
        sleep(Duration::from_millis(100)).await;
    }

    waits.sort();
    let (median, longest) = (waits[50], waits[99]);
    let statuses = unread.statuses.lock().unwrap().clone();
    let count = |wanted: u16| statuses.iter().filter(|&&status| status == wanted).count();
    let [streams, refused] = [200, 503].map(count);
    eprintln!("{streams} responses began and {refused} were refused, of {}", statuses.len());
    assert!(streams > 10, "{statuses:?}");
    eprintln!(
        "{before} MiB before, {most} MiB at most; a list took {median:?}, {longest:?} at most"
    );
    assert!(most < 256, "{most} MiB");
    assert!(median < Duration::from_secs(1), "{waits:?}");
    drop(lister);
}
