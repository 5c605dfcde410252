//! Guests whose kernels attack their VMMs: the cost to the host is bounded, and other sandboxes
//! keep running.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::Path;
use std::time::Duration;

use bhatti_testkit::{
    Api, Feature, TestDaemon, needs, repository, resident_mib, vmm_pid, wait_for,
};
use futures_util::future::join_all;
use serde_json::json;
use tokio::time::timeout;

/// The type of a network device in the virtio specification.
const NETWORK: u32 = 1;
/// The attacked device types, as the virtio specification numbers them; 0 attacks all at once.
const DEVICES: [(&str, u32); 4] = [("network", NETWORK), ("block", 2), ("console", 3), ("all", 0)];

/// How long an attack may take.
const ATTACK_TIME: Duration = Duration::from_secs(30);

/// Limit of the daemon's resident memory, in MiB: far more than it takes with five sandboxes.
const DAEMON_MIB_MAX: u64 = 128;
/// Limit of the files that a VMM writes besides disk and memory, in bytes.
const FILES_BYTES_MAX: u64 = 8 << 20;

/// Script that loads the module, because minimal images have no insmod.
const LOAD: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
file = os.open('/root/hostile.ko', os.O_RDONLY)
if libc.syscall(313, file, sys.argv[1].encode(), 0):
    sys.exit(os.strerror(ctypes.get_errno()))
"#;

/// Attacks one device type until the guest reports completion, stops answering, or [`ATTACK_TIME`]
/// is over: a process may hang forever on the disk that it has broken.
async fn attack(daemon: &TestDaemon, api: &Api, name: &str, device: u32) {
    let mut create = daemon.cli(&["create", "--name", name, "--memory", "256", "--file"]);
    let module = repository().join("target/test-data/hostile.ko");
    create.arg(format!("{}:/root/hostile.ko", module.display()));
    let created = create.output().await.unwrap();
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let parameters = format!("seed=1 rounds=20000 device={device}");
    let exec = json!({ "cmd": ["python3", "-c", LOAD, parameters], "user": "root" });
    let path = format!("/sandboxes/{name}/exec");
    let loaded = api.call("POST", &path, &exec);
    let jobs = format!("/sandboxes/{name}/jobs");
    let answers_no_more = async { while api.get(&jobs).await.status == 200 {} };
    let attacked = async {
        tokio::select! {
            answer = loaded => Some(answer),
            () = answers_no_more => None,
        }
    };
    let answer = timeout(ATTACK_TIME, attacked).await.ok().flatten();
    if device == NETWORK {
        // The guest works without its network card, so it can report that the module was loaded and
        // completed its rounds.
        assert_eq!(answer.unwrap().json()["exit_code"], 0, "{name}");
    }
}

/// Returns the total size of the files in a VM's directory except disk and memory, in bytes.
fn other_files_bytes(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    let other = entries.filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        !["disk-", "memory-", "rootfs-"].iter().any(|kind| name.starts_with(kind))
    });
    other.map(|entry| entry.metadata().map_or(0, |metadata| metadata.len())).sum()
}

#[tokio::test]
async fn guest_kernels_that_attack_their_devices_harm_no_other_sandbox() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let other = json!({ "name": "other", "memory_mb": 256 });
    assert_eq!(api.call("POST", "/sandboxes", &other).await.status, 201);

    let attacks = DEVICES.map(|(name, device)| attack(&daemon, &api, name, device));
    join_all(attacks).await;

    assert_eq!(api.sh("other", "echo undisturbed").await, "undisturbed\n");
    let resident = resident_mib(daemon.pid());
    assert!(resident < DAEMON_MIB_MAX, "the daemon takes {resident} MiB");
    for directory in daemon.sandbox_directories() {
        let bytes = other_files_bytes(&directory);
        assert!(bytes < FILES_BYTES_MAX, "{}: {bytes} bytes", directory.display());
    }
    let vmms: Vec<u32> =
        daemon.sandbox_directories().iter().filter_map(|directory| vmm_pid(directory)).collect();
    for (name, _) in DEVICES {
        let path = format!("/sandboxes/{name}");
        let destroyed = api.call("DELETE", &path, &json!({})).await;
        assert_eq!(destroyed.status, 200, "{name}: {}", destroyed.text());
    }
    assert_eq!(api.call("DELETE", "/sandboxes/other", &json!({})).await.status, 200);
    wait_for("the end of all VMMs", || {
        vmms.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    })
    .await;
}
