//! A guest whose kernel attacks its VMM: what that costs this host, and that other sandboxes go on.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::Path;
use std::time::Duration;

use bhatti_testkit::{
    Api, Feature, TestDaemon, needs, repository, resident_mib, vmm_pid, wait_for,
};
use futures_util::future::join_all;
use serde_json::json;
use tokio::time::timeout;

/// The kinds of devices, as the virtio specification numbers them, and all at once.
const NETWORK: u32 = 1;
const DEVICES: [(&str, u32); 4] = [("network", NETWORK), ("block", 2), ("console", 3), ("all", 0)];

/// How long an attack may take.
const ATTACK_TIME: Duration = Duration::from_secs(30);

/// What the daemon may have in memory, in MiB: far more than it has with six sandboxes.
const DAEMON_MIB_MAX: u64 = 128;
/// What the files that a VMM writes beside disk and memory may take on this host, in bytes.
const FILES_BYTES_MAX: u64 = 8 << 20;

/// Loads the module; minimal images have no insmod.
const LOAD: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
file = os.open('/root/hostile.ko', os.O_RDONLY)
if libc.syscall(313, file, sys.argv[1].encode(), 0):
    sys.exit(os.strerror(ctypes.get_errno()))
"#;

/// Attacks one kind of device, until the guest says that it has, does not answer any more, or the
/// time of the attack is over: a process may hang for ever on the disk that it has broken.
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
        // Without its card the guest does all else that it did: so the module was loaded, and went through its rounds.
        assert_eq!(answer.unwrap().json()["exit_code"], 0, "{name}");
    }
}

/// What the files in a VM's directory take, but for its disk and its memory.
fn other_files_bytes(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    let other = entries.filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        !["disk-", "memory-", "rootfs-"].iter().any(|kind| name.starts_with(kind))
    });
    other.map(|entry| entry.metadata().map_or(0, |metadata| metadata.len())).sum()
}

#[tokio::test]
async fn guests_whose_kernels_attack_their_devices_harm_nobody_else() {
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
    assert!(resident < DAEMON_MIB_MAX, "the daemon has {resident} MiB");
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
