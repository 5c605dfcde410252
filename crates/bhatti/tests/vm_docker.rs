//! Sandboxes on the Docker engine: equal, weaker and missing features. The tests use the Docker
//! daemon at `DOCKER_SOCK`, or at the default socket; they do not start one.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use bhatti_testkit::{Api, Serve, TestDaemon, skip, wait_for};
use serde_json::{Value, json};

/// Returns Docker's socket. If Docker does not answer there, reports the skip and returns `None`.
async fn socket() -> Option<String> {
    let socket = std::env::var("DOCKER_SOCK").unwrap_or_else(|_| bhatti_docker::SOCKET.to_owned());
    match bhatti_docker::check(socket.as_ref()).await {
        Ok(_) => Some(socket),
        Err(error) => {
            skip("docker engine", &error.to_string());
            None
        }
    }
}

async fn daemon(more: &str) -> Option<(TestDaemon, Api)> {
    let socket = socket().await?;
    let config = format!("engine: docker\ndocker: {socket}\n{more}");
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let api = Api::admin(&daemon);
    Some((daemon, api))
}

/// Runs a script as root in the sandbox `dev` and returns its trimmed output.
async fn root(api: &Api, script: &str) -> String {
    let command = json!({ "cmd": ["sh", "-c", script], "user": "root" });
    let ran = api.exec("dev", command).await;
    assert_eq!(ran["exit_code"], 0, "{script}: {ran}");
    ran["stdout"].as_str().unwrap().trim().to_owned()
}

/// Reads a capability set from `/proc/self/status`, as a number.
async fn capabilities(api: &Api, set: &str) -> u64 {
    let line = root(api, &format!("grep {set}: /proc/self/status")).await;
    u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap()
}

#[tokio::test]
async fn root_in_a_container_is_restricted() {
    let Some((_daemon, api)) = daemon("").await else { return };
    let request = json!({ "name": "dev", "memory_mb": 256 });
    assert_eq!(api.call("POST", "/sandboxes", &request).await.status, 201);

    let net_admin = 1 << 12;
    let allowed = [0, 1, 3, 4, 5, 6, 7, 10, 18].iter().fold(0, |set, bit| set | 1 << bit);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let has = capabilities(&api, set).await;
        assert_eq!(has & !allowed, 0, "{set} {has:x}");
        assert_eq!(has & net_admin, 0, "NET_ADMIN is the guest agent's alone");
    }
    let status = root(&api, "grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status").await;
    assert_eq!(status, "NoNewPrivs:\t1\nSeccomp:\t2");
    for refused in [
        "ip link set eth0 down",
        "ip addr add 10.0.0.1/24 dev eth0",
        "mount -t tmpfs none /mnt",
        "echo x >>/run/lohar",
        "cat /proc/1/mem",
        "unshare --net true",
        "echo 1 >/proc/sys/vm/drop_caches",
        "mknod /tmp/disk b 254 0",
    ] {
        let script = format!("{refused} 2>/dev/null && echo done || echo refused");
        assert_eq!(root(&api, &script).await, "refused", "{refused}");
    }
    // Memory and processes are limited: a process beyond the memory limit is killed, and the
    // sandbox keeps running.
    let greedy = "python3 -c 'b = bytearray(400 << 20)' 2>/dev/null; echo $?";
    assert_eq!(root(&api, greedy).await, "137");
    let pids = "cat /sys/fs/cgroup/pids/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids.max";
    assert_eq!(root(&api, pids).await, "8192");
}

#[tokio::test]
async fn weaker_isolation_and_missing_features_are_reported() {
    let Some((daemon, api)) = daemon("").await else { return };
    let created = daemon.cli(&["create", "--name", "dev", "--json"]).output().await.unwrap();
    let created: Value = serde_json::from_slice(&created.stdout).unwrap();
    assert_eq!(created["isolation"], "container");
    let inspected = daemon.cli(&["inspect", "dev"]).output().await.unwrap();
    let said = String::from_utf8(inspected.stdout).unwrap();
    assert!(said.contains("container (shares this host's kernel)"), "{said}");
    assert_eq!(api.get("/sandboxes/dev").await.json()["isolation"], "container");
    assert!(daemon.log().contains("share this host's kernel"));
    let health = api.get("/health").await.json();
    assert_eq!((&health["engine"], &health["accelerator"]), (&json!("docker"), &json!("none")));

    for path in ["fork", "checkpoint"] {
        let body = json!({ "name": "other" });
        let refused = api.call("POST", &format!("/sandboxes/dev/{path}"), &body).await;
        assert_eq!(refused.refusal(), (501, "unsupported".to_owned()), "{path}");
        assert!(refused.json()["hint"].as_str().unwrap().contains("engine: qemu"));
    }
    assert_eq!(api.get("/sandboxes").await.json().as_array().unwrap().len(), 1);
    assert_eq!(api.get("/snapshots").await.json(), json!([]));
    assert_eq!(api.sh("dev", "echo goes on").await, "goes on\n");
}

#[tokio::test]
async fn idle_container_is_paused_and_never_ended() {
    let thermal = "thermal: {warm_after_ms: 200, cold_after_ms: 1}\n";
    let Some((daemon, api)) = daemon(thermal).await else { return };
    assert_eq!(api.call("POST", "/sandboxes", &json!({ "name": "dev" })).await.status, 201);
    let leave = "echo marker >/dev/shm/ram; echo kept >/workspace/disk; sleep 1000 >/dev/null 2>&1 & echo $! >/dev/shm/pid";
    api.sh("dev", leave).await;
    let thermal = async || api.get("/sandboxes/dev").await.json()["thermal"].clone();
    while thermal().await != "warm" {}
    let find = "cat /dev/shm/ram; kill -0 $(cat /dev/shm/pid) && echo alive";
    assert_eq!(api.sh("dev", find).await, "marker\nalive\n");

    // With `--stop-sandboxes`, the daemon leaves containers running: their processes could not be
    // restored.
    let mut daemon = daemon;
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.arguments = vec!["--stop-sandboxes".into()]).await;
    daemon.terminate().await;
    assert!(daemon.log().contains("Sandbox was not saved; it stays as it is"));
    daemon.serve().await;
    assert_eq!(api.sh("dev", find).await, "marker\nalive\n");

    // A stop ends the container's processes and keeps its disk.
    let stopped = api.call("POST", "/sandboxes/dev/stop", &Value::Null).await;
    assert_eq!(stopped.json()["status"], "stopped");
    assert_eq!(daemon.vmm_pids(), Vec::<u32>::new());
    let started = api.call("POST", "/sandboxes/dev/start", &Value::Null).await;
    assert_eq!(started.json()["thermal"], "hot", "{}", started.text());
    let find = "cat /workspace/disk; test -e /dev/shm/ram || echo forgotten";
    assert_eq!(api.sh("dev", find).await, "kept\nforgotten\n");
    assert_eq!(api.call("DELETE", "/sandboxes/dev", &Value::Null).await.status, 200);
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn next_daemon_finishes_an_interrupted_container_stop() {
    for step in ["stop_noted", "ended"] {
        let Some((mut daemon, api)) = daemon("").await else { return };
        let volume = json!({ "name": "data", "size_mb": 64 });
        assert_eq!(api.call("POST", "/volumes", &volume).await.status, 201);
        let request = json!({ "name": "dev", "volumes": [{ "name": "data", "target": "/data" }] });
        assert_eq!(api.call("POST", "/sandboxes", &request).await.status, 201);
        api.sh("dev", "echo disk >/workspace/kept; echo volume >/data/kept").await;
        daemon.terminate().await;
        daemon
            .serve_with(|serve| serve.fault = bhatti_testkit::fault!(format!("daemon:{step}")))
            .await;
        assert!(daemon.client.stop("dev").await.is_err(), "{step}: the daemon answered");
        daemon.ended().await;

        daemon.serve_with(|serve| serve.fault = None).await;

        wait_for("the container's end", || daemon.vmm_pids().is_empty()).await;
        assert_eq!(api.get("/sandboxes/dev").await.json()["status"], "stopped", "{step}");
        let started = api.call("POST", "/sandboxes/dev/start", &Value::Null).await;
        assert_eq!(started.json()["status"], "running", "{step}: {}", started.text());
        assert_eq!(api.sh("dev", "cat /workspace/kept /data/kept").await, "disk\nvolume\n");
        assert_eq!(api.call("DELETE", "/sandboxes/dev", &Value::Null).await.status, 200);
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let data_dir = daemon.data_dir().to_string_lossy().into_owned();
        assert!(!mounts.contains(&data_dir), "{step}: {mounts}");
        assert_eq!(api.call("DELETE", "/volumes/data", &Value::Null).await.status, 200);
    }
}

#[tokio::test]
async fn sandbox_of_a_removed_container_reports_it_and_can_be_destroyed() {
    let Some((daemon, api)) = daemon("").await else { return };
    assert_eq!(api.call("POST", "/sandboxes", &json!({ "name": "dev" })).await.status, 201);
    daemon.remove_containers();
    while api.get("/sandboxes/dev").await.json()["status"] != "failed" {}

    let cold = json!({ "cold_boot": true });
    let started = api.call("POST", "/sandboxes/dev/start", &cold).await;

    assert_eq!(started.refusal(), (500, "boot_failed".to_owned()));
    assert!(started.text().contains("the sandbox's disk is lost"), "{}", started.text());
    assert_eq!(api.call("DELETE", "/sandboxes/dev", &Value::Null).await.status, 200);
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn forged_volume_is_refused() {
    let Some((daemon, api)) = daemon("").await else { return };
    let volume = json!({ "name": "data", "size_mb": 64 });
    assert_eq!(api.call("POST", "/volumes", &volume).await.status, 201);
    let volumes = std::fs::read_dir(daemon.data_dir().join("volumes")).unwrap();
    let files = volumes.flatten().flat_map(|volume| std::fs::read_dir(volume.path()).unwrap());
    let file = files.flatten().next().unwrap().path();
    // A guest that has the volume as a disk can write this: the clean flag is set, but the root
    // directory is missing.
    let mut debugfs = bhatti_host::process::command("debugfs");
    let forged = debugfs.args(["-w", "-R", "clri <2>"]).arg(&file).output().await.unwrap();
    assert!(forged.status.success(), "{forged:?}");

    let request = json!({ "name": "dev", "volumes": [{ "name": "data", "target": "/data" }] });
    let refused = api.call("POST", "/sandboxes", &request).await;

    assert!(refused.text().contains("is damaged"), "{}", refused.text());
    assert_eq!(refused.status, 409);
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
    assert_eq!(api.call("DELETE", "/volumes/data", &Value::Null).await.status, 200);
}

#[tokio::test]
async fn disk_has_the_requested_size_or_is_refused() {
    let Some((daemon, api)) = daemon("").await else { return };

    let answer = api.call("POST", "/sandboxes", &json!({ "name": "dev", "disk_mb": 8192 })).await;

    if answer.status == 201 {
        let size = root(&api, "df --block-size=1M --output=size / | tail -1").await;
        let mib: u64 = size.trim().parse().unwrap();
        assert!((7_000..=8_192).contains(&mib), "{mib} MiB");
    } else {
        assert_eq!(answer.refusal(), (400, "bad_request".to_owned()), "{}", answer.text());
        assert!(answer.text().contains("Docker cannot limit"), "{}", answer.text());
        assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
        assert_eq!(api.call("POST", "/sandboxes", &json!({ "name": "dev" })).await.status, 201);
    }
}

#[tokio::test]
async fn missing_docker_is_an_error_with_a_hint() {
    let mut daemon = TestDaemon::start().await;
    daemon.terminate().await;
    let config = "engine: docker\ndocker: /nowhere/docker.sock\n";
    std::fs::write(daemon.data_dir().join("config.yaml"), config).unwrap();

    let refused = daemon.cli(&["serve"]).output().await.unwrap();

    assert!(!refused.status.success());
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("Docker does not listen at `/nowhere/docker.sock`"), "{said}");
    assert!(said.contains("hint: start it, or name its socket with `docker: PATH`"), "{said}");
    let looked = daemon.cli(&["doctor"]).output().await.unwrap();
    let said = String::from_utf8(looked.stdout).unwrap();
    assert!(said.contains("MISSING  docker"), "{said}");
}
