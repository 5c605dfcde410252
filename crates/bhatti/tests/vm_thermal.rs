//! Pausing, stopping, waking and forking sandboxes through a real daemon.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_api::{
    CreateSandbox, CreateSnapshot, ErrorCode, ForkSandbox, ResumeSnapshot, StartSandbox,
    UpdateSandbox,
};
use bhatti_client::Client;
use bhatti_host::process::can_use_users;
use bhatti_testkit::{
    FailingCalls, Feature, LIMIT, Serve, SmallDisk, TestDaemon, check_disk, code_of, engine,
    hashes, is_root, named, needs, replace, run, shell, skip, vmm_pid, wait_for,
};
use tokio::time::timeout;

/// Script that leaves a marker in memory and a background process.
const LEAVE: &str =
    "echo marker >/dev/shm/ram; sleep 100000 >/dev/null 2>&1 & echo $! >/dev/shm/pid";
/// Script that prints the marker and checks that the process is alive.
const FIND: &str = "cat /dev/shm/ram; kill -0 $(cat /dev/shm/pid) && echo alive";
const FOUND: &str = "marker\nalive\n";

fn with_config(config: &str) -> Serve {
    Serve { config: config.to_owned(), ..Serve::default() }
}

async fn thermal_is(client: &Client, sandbox: &str, wanted: &str) {
    let becomes = async {
        while client.inspect(sandbox).await.unwrap().thermal.as_deref() != Some(wanted) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, becomes).await.unwrap_or_else(|_| panic!("{sandbox} did not become {wanted}"));
}

#[tokio::test]
async fn idle_sandbox_cools_and_any_request_wakes_it() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let config = "thermal: {warm_after_ms: 300, cold_after_ms: 300}\n";
    let daemon = TestDaemon::start_with(with_config(config)).await;
    let client = &daemon.client;
    client.create(&named("idle")).await.unwrap();
    client.create(&CreateSandbox { keep_hot: true, ..named("kept") }).await.unwrap();
    client.create(&named("used")).await.unwrap();
    shell(client, "idle", LEAVE).await;
    let user = client.clone();
    let script = "until test -e /tmp/end; do sleep 0.1; done; echo done";
    let using = tokio::spawn(async move { shell(&user, "used", script).await });

    thermal_is(client, "idle", "warm").await;
    assert_eq!(shell(client, "idle", FIND).await, FOUND);
    thermal_is(client, "idle", "cold").await;
    assert_eq!(daemon.vmm_pids().len(), 2, "a cold sandbox has no process");
    for name in ["kept", "used"] {
        assert_eq!(client.inspect(name).await.unwrap().thermal.as_deref(), Some("hot"), "{name}");
    }
    assert_eq!(shell(client, "idle", FIND).await, FOUND);
    shell(client, "used", "touch /tmp/end").await;
    assert_eq!(using.await.unwrap(), "done\n");
    thermal_is(client, "used", "cold").await;

    // Setting `keep_hot` wakes a cold sandbox.
    let hot = UpdateSandbox { keep_hot: Some(true), ..UpdateSandbox::default() };
    assert_eq!(client.update("used", &hot).await.unwrap().thermal.as_deref(), Some("hot"));
}

#[tokio::test]
async fn sandbox_stays_stopped_until_started_and_transitions_are_idempotent() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let mut daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    shell(&daemon.client, "dev", LEAVE).await;
    for _ in 0..2 {
        assert_eq!(daemon.client.pause("dev").await.unwrap().thermal.as_deref(), Some("warm"));
    }
    for _ in 0..2 {
        assert_eq!(daemon.client.resume("dev").await.unwrap().thermal.as_deref(), Some("hot"));
    }
    for _ in 0..2 {
        assert_eq!(daemon.client.stop("dev").await.unwrap().status, "stopped");
    }
    assert_eq!(daemon.vmm_pids(), Vec::<u32>::new());
    for refused in [
        run(&daemon.client, "dev", &["true"]).await.unwrap_err(),
        daemon.client.resume("dev").await.unwrap_err(),
        daemon.client.pause("dev").await.unwrap_err(),
        daemon.client.fork("dev", &ForkSandbox::default()).await.unwrap_err(),
    ] {
        assert_eq!(code_of(&refused), Some(ErrorCode::WrongState), "{refused}");
    }

    daemon.terminate().await;
    daemon.serve().await;

    assert_eq!(daemon.client.inspect("dev").await.unwrap().status, "stopped");
    for _ in 0..2 {
        let started = daemon.client.start("dev", &StartSandbox::default()).await.unwrap();
        assert_eq!(started.thermal.as_deref(), Some("hot"));
    }
    let cold = StartSandbox { cold_boot: true };
    let refused = daemon.client.start("dev", &cold).await.unwrap_err();
    assert_eq!(code_of(&refused), Some(ErrorCode::WrongState), "a cold boot would lose the memory");
    assert_eq!(shell(&daemon.client, "dev", FIND).await, FOUND);
    let directory = &daemon.sandbox_directories()[0];
    assert!(!directory.join("snapshot").exists(), "the start did not consume the snapshot");
}

#[tokio::test]
async fn sandbox_shown_as_running_is_usable_while_it_starts() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    client.create(&named("dev")).await.unwrap();
    shell(client, "dev", LEAVE).await;
    client.stop("dev").await.unwrap();

    let starter = client.clone();
    let starting =
        tokio::spawn(async move { starter.start("dev", &StartSandbox::default()).await });
    timeout(LIMIT, async { while client.inspect("dev").await.unwrap().status != "running" {} })
        .await
        .unwrap();
    assert_eq!(shell(client, "dev", FIND).await, FOUND);
    starting.await.unwrap().unwrap();
}

#[tokio::test]
async fn stopping_daemon_hands_over_or_saves_its_sandboxes() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let mut daemon = TestDaemon::start().await;
    for name in ["hot", "warm"] {
        daemon.client.create(&named(name)).await.unwrap();
        shell(&daemon.client, name, LEAVE).await;
    }
    daemon.client.pause("warm").await.unwrap();
    daemon.terminate().await;
    assert_eq!(daemon.all_vmm_pids().len(), 2, "the daemon left a spare VM behind");

    daemon.serve_with(|serve| serve.arguments.push("--stop-sandboxes".to_owned())).await;
    for name in ["warm", "hot"] {
        assert_eq!(daemon.client.inspect(name).await.unwrap().thermal.as_deref(), Some(name));
    }
    daemon.terminate().await;
    assert_eq!(daemon.all_vmm_pids(), Vec::<u32>::new());

    daemon.serve_with(|serve| serve.arguments.clear()).await;
    for name in ["warm", "hot"] {
        assert_eq!(daemon.client.inspect(name).await.unwrap().thermal.as_deref(), Some("cold"));
        assert_eq!(shell(&daemon.client, name, FIND).await, FOUND);
    }
}

#[tokio::test]
async fn hundred_requests_at_once_wake_a_sandbox_once() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    client.create(&named("dev")).await.unwrap();
    let config = "hundred";
    shell(client, "dev", &format!("echo {config} >/dev/shm/ram")).await;
    for cold in [false, true] {
        client.pause("dev").await.unwrap();
        if cold {
            client.stop("dev").await.unwrap();
            // A stopped sandbox is not woken by requests, so it is started and paused again.
            client.start("dev", &StartSandbox::default()).await.unwrap();
            client.pause("dev").await.unwrap();
        }
        let requests: Vec<_> = (0..100)
            .map(|_| {
                let client = client.clone();
                tokio::spawn(async move {
                    run(&client, "dev", &["cat", "/dev/shm/ram"]).await.map(|ran| ran.stdout)
                })
            })
            .collect();
        for request in requests {
            assert_eq!(request.await.unwrap().unwrap(), b"hundred\n", "cold: {cold}");
        }
        assert_eq!(daemon.vmm_pids().len(), 1);
    }
}

#[tokio::test]
async fn hundred_requests_at_once_wake_a_cold_sandbox_once() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let config = "thermal: {warm_after_ms: 100, cold_after_ms: 100}\nready_vmms: 0\n";
    let daemon = TestDaemon::start_with(with_config(config)).await;
    daemon.client.create(&named("dev")).await.unwrap();
    shell(&daemon.client, "dev", LEAVE).await;
    thermal_is(&daemon.client, "dev", "cold").await;

    let requests = (0..100).map(|_| {
        let client = daemon.client.clone();
        tokio::spawn(async move { shell(&client, "dev", FIND).await })
    });
    for request in requests.collect::<Vec<_>>() {
        assert_eq!(request.await.unwrap(), FOUND);
    }

    assert!(daemon.all_vmm_pids().len() <= 1);
    let woken = daemon.log().matches("Sandbox saved").count();
    assert!(woken <= 3, "the sandbox was saved {woken} times");
}

#[tokio::test]
async fn wake_breaker_refuses_requests_until_start_succeeds() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let config = "thermal: {warm_after_ms: 100, cold_after_ms: 100}\nready_vmms: 0\n";
    let daemon = TestDaemon::start_with(with_config(config)).await;
    let client = &daemon.client;
    client.create(&named("dev")).await.unwrap();
    shell(client, "dev", LEAVE).await;
    thermal_is(client, "dev", "cold").await;
    let manifest = daemon.sandbox_directories()[0].join("snapshot/manifest.json");
    let whole = std::fs::read(&manifest).unwrap();
    replace(&manifest, "");
    let request = || client.stat("dev", "/dev/shm/ram");

    for _ in 0..3 {
        assert_eq!(code_of(&request().await.unwrap_err()), Some(ErrorCode::SnapshotUnusable));
    }
    replace(&manifest, whole);
    let refused = request().await.unwrap_err();

    assert_eq!(code_of(&refused), Some(ErrorCode::SnapshotUnusable), "the wake was tried again");
    assert!(refused.to_string().contains("3 times in a row"), "{refused}");
    client.start("dev", &StartSandbox::default()).await.unwrap();
    assert_eq!(shell(client, "dev", FIND).await, FOUND);
    thermal_is(client, "dev", "cold").await;
    assert_eq!(shell(client, "dev", FIND).await, FOUND);
}

#[tokio::test]
async fn destroyed_sandbox_is_never_woken() {
    let daemon = TestDaemon::start().await;
    let rounds = (0..2).map(|worker| {
        let client = daemon.client.clone();
        tokio::spawn(async move {
            for round in 0..15 {
                let name = format!("w{worker}-{round}");
                client.create(&named(&name)).await.unwrap();
                if round % 5 == 0 {
                    client.stop(&name).await.unwrap();
                } else {
                    client.pause(&name).await.unwrap();
                }
                let waking = {
                    let (client, name) = (client.clone(), name.clone());
                    tokio::spawn(async move {
                        drop(client.start(&name, &StartSandbox::default()).await);
                        drop(run(&client, &name, &["true"]).await);
                    })
                };
                client.destroy(&name).await.unwrap();
                waking.await.unwrap();
            }
        })
    });
    for round in rounds.collect::<Vec<_>>() {
        round.await.unwrap();
    }

    assert_eq!(daemon.client.list().await.unwrap(), []);
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
    wait_for("no VMM except the spare", || daemon.all_vmm_pids().len() <= 1).await;
}

#[tokio::test]
async fn stops_and_a_destroy_at_once_are_all_answered_and_leave_nothing() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    for _ in 0..3 {
        client.create(&named("dev")).await.unwrap();
        let (first, second, destroyed) =
            tokio::join!(client.stop("dev"), client.stop("dev"), client.destroy("dev"));

        destroyed.unwrap();
        for stop in [first, second] {
            match stop {
                Ok(stopped) => assert_eq!(stopped.status, "stopped"),
                Err(error) => {
                    let gone = [Some(ErrorCode::NotFound), Some(ErrorCode::WrongState)];
                    assert!(gone.contains(&code_of(&error)), "{error}: {}", daemon.log());
                }
            }
        }
        assert_eq!(client.list().await.unwrap(), []);
        assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
    }
    wait_for("no VMM except the spare", || daemon.all_vmm_pids().len() <= 1).await;
}

#[tokio::test]
async fn twenty_stops_under_traffic_keep_memory_and_disk() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    client.create(&named("dev")).await.unwrap();
    shell(client, "dev", LEAVE).await;
    let traffic = "cd /workspace; while :; do head -c 300000 /dev/urandom >t; sync t; sha256sum t >t.sum; cat t >>log; [ $(stat -c %s log) -lt 20000000 ] || : >log; echo x >>/dev/shm/rounds; done";
    shell(client, "dev", &format!(": >/dev/shm/rounds; ({traffic}) >/dev/null 2>&1 &")).await;
    shell(client, "dev", "head -c 5000000 /dev/urandom >/workspace/fixed; sha256sum /workspace/fixed >/dev/shm/fixed.sum").await;
    let mut rounds = 0;
    for cycle in 0..20 {
        let script = "while [ $(wc -l </dev/shm/rounds) -le ROUNDS ]; do sleep 0.05; done; wc -l </dev/shm/rounds";
        let now = shell(client, "dev", &script.replace("ROUNDS", &rounds.to_string())).await;
        rounds = now.trim().parse::<u64>().unwrap();
        client.stop("dev").await.unwrap();
        client.start("dev", &StartSandbox::default()).await.unwrap();
        assert_eq!(shell(client, "dev", FIND).await, FOUND, "cycle {cycle}");
        let sum = shell(client, "dev", "sha256sum -c /dev/shm/fixed.sum").await;
        assert!(sum.contains("OK"), "cycle {cycle}: {sum}");
    }
    let complaints = "pkill -f '[h]ead -c 300000'; sudo dmesg | grep -ciE 'ext4.*(error|corrupt)|lockup' || true";
    assert_eq!(shell(client, "dev", complaints).await, "0\n");
    client.stop("dev").await.unwrap();
    let directory = daemon.sandbox_directories().remove(0);
    check_disk(&directory).await;
}

#[tokio::test]
async fn forks_get_their_own_identity_and_the_parent_keeps_running() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    let secret = [("SECRET".to_owned(), "CANARY".to_owned())].into();
    client.create(&CreateSandbox { env: secret, ..named("parent") }).await.unwrap();
    shell(client, "parent", LEAVE).await;
    shell(
        client,
        "parent",
        "while :; do echo x >>/dev/shm/ticks; sleep 0.01; done >/dev/null 2>&1 &",
    )
    .await;
    let request = ForkSandbox { count: Some(2), name: Some("fork".into()), ..Default::default() };

    let forks = client.fork("parent", &request).await.unwrap();

    let who = "head -c 16 /dev/urandom | od -An -tx1; cat /etc/machine-id; hostname; cat /proc/sys/kernel/random/uuid";
    let mut seen = Vec::new();
    for name in ["parent", "fork-1", "fork-2"] {
        assert_eq!(shell(client, name, FIND).await, FOUND, "{name}");
        seen.extend(shell(client, name, who).await.lines().map(str::to_owned));
        let more = "a=$(wc -l </dev/shm/ticks); until [ $(wc -l </dev/shm/ticks) -gt $a ]; do sleep 0.01; done; echo on";
        assert_eq!(shell(client, name, more).await, "on\n", "{name}");
    }
    let all = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), all, "{seen:?}");
    assert_eq!(shell(client, "parent", "echo $SECRET").await, "CANARY\n");
    assert_eq!(shell(client, "fork-1", "echo $SECRET").await, "\n");
    let inherit =
        ForkSandbox { inherit_env: true, name: Some("heir".into()), ..Default::default() };
    client.fork("parent", &inherit).await.unwrap();
    assert_eq!(shell(client, "heir", "echo $SECRET").await, "CANARY\n");
    // For programs that began before the fork.
    let written =
        "tr '\\0' '\\n' </run/lohar/environment; stat -c '%A %U %G' /run/lohar/environment";
    for (name, variable) in
        [("parent", "SECRET=CANARY\n"), ("fork-1", ""), ("heir", "SECRET=CANARY\n")]
    {
        let expected = format!("{variable}-rw-r----- root user\n");
        assert_eq!(shell(client, name, written).await, expected, "{name}");
    }
    for fork in &forks.sandboxes {
        let report = fork.identity.as_ref().unwrap();
        for part in ["rng", "wall_clock", "hostname", "machine_id", "token", "environment"] {
            assert_eq!(report[part]["result"], "done", "{part}");
        }
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let clock = shell(client, &fork.name, "date +%s%3N").await;
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let clock: u128 = clock.trim().parse().unwrap();
        assert!((before - 100..after + 100).contains(&clock), "{before} {clock} {after}");
    }

    // Parent and forks are independent: changing or ending one leaves the others unchanged.
    for name in ["parent", "fork-1"] {
        shell(client, name, &format!("echo {name} >/dev/shm/ram")).await;
    }
    client.destroy("parent").await.unwrap();
    client.stop("fork-1").await.unwrap();
    client.start("fork-1", &StartSandbox::default()).await.unwrap();
    assert_eq!(shell(client, "fork-1", FIND).await, "fork-1\nalive\n");
    assert_eq!(shell(client, "fork-2", FIND).await, FOUND);
    let taken = ForkSandbox { count: Some(3), name: Some("fork".into()), ..Default::default() };
    let refused = client.fork("fork-2", &taken).await.unwrap_err();
    assert_eq!(code_of(&refused), Some(ErrorCode::NameTaken));
    let mut names: Vec<_> =
        client.list().await.unwrap().into_iter().map(|sandbox| sandbox.name).collect();
    names.sort();
    let long = ForkSandbox { count: Some(10), name: Some("x".repeat(61)), ..Default::default() };
    let refused = client.fork("fork-2", &long).await.unwrap_err();
    assert_eq!(code_of(&refused), Some(ErrorCode::BadRequest), "{refused}");
    assert_eq!(client.list().await.unwrap().len(), 3);
    assert_eq!(names, ["fork-1", "fork-2", "heir"], "a refused fork request left some forks");
    assert_eq!(shell(client, "fork-2", FIND).await, FOUND);
}

#[tokio::test]
async fn base_snapshot_is_not_changed_by_its_forks() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    let created = client.create(&named("one")).await.unwrap();
    let key = created.origin.strip_prefix("template ").unwrap();
    let template = daemon.data_dir().join("templates").join(key);
    let before = hashes(&template);

    client.create(&named("two")).await.unwrap();
    for name in ["one", "two"] {
        shell(client, name, "head -c 20000000 /dev/urandom | tee /dev/shm/x >/workspace/x; sync")
            .await;
        client.stop(name).await.unwrap();
        client.start(name, &StartSandbox::default()).await.unwrap();
    }

    assert_eq!(hashes(&template), before);
}

#[tokio::test]
async fn snapshot_that_cannot_be_written_leaves_the_sandbox_running() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    if !is_root() {
        skip("a stop on a full disk", "mounting a small disk needs root");
        return;
    }
    let mut daemon = TestDaemon::start().await;
    daemon.terminate().await;
    // 1 GiB has room for disk and memory of two sandboxes, on engines that copy both.
    let disk = SmallDisk::mount(&daemon.data_dir().join("sandboxes"), "1g").await;
    daemon.serve_with(|serve| serve.config += "ready_vmms: 0\nready_forks: 0\n").await;
    let client = &daemon.client;
    client.create(&named("dev")).await.unwrap();
    shell(client, "dev", LEAVE).await;
    shell(client, "dev", "head -c 40000000 /dev/urandom >/dev/shm/much").await;
    let directory = daemon.sandbox_directories().remove(0);
    disk.fill(&directory.join("filler"), 24 << 20).await;

    let refused = client.stop("dev").await.unwrap_err();

    assert_eq!(code_of(&refused), Some(ErrorCode::HostDiskFull));
    assert_eq!(client.inspect("dev").await.unwrap().thermal.as_deref(), Some("hot"));
    assert_eq!(shell(client, "dev", FIND).await, FOUND);
    assert!(!directory.join("snapshot").exists() && !directory.join("snapshot.tmp").exists());
    shell(client, "dev", "rm /dev/shm/much").await;
    client.destroy("dev").await.unwrap();
    // A new sandbox has little to save, so its stop succeeds.
    client.create(&named("small")).await.unwrap();
    client.stop("small").await.unwrap();
    client.start("small", &StartSandbox::default()).await.unwrap();
}

/// Write failures during a stop: the process whose system calls fail, the system calls, and the
/// path in the sandbox's directory.
const FAILING_WRITES: [(&str, &str, &str); 7] = [
    ("daemon", "rename", "snapshot.tmp"),
    ("daemon", "fsync", "snapshot.tmp"),
    ("daemon", "fsync", ""),
    ("daemon", "fsync", "snapshot.tmp/memory.pages"),
    ("daemon", "write,writev,pwrite64", "snapshot.tmp/memory.pages"),
    ("vmm", "write,writev,pwrite64,pwritev", "device.state"),
    ("daemon", CHOWN, "device.state"),
];
/// The calls by which the daemon changes a file's owner to the VM's user. strace ignores those
/// marked `?` on architectures that lack them.
const CHOWN: &str = "?lchown,?chown,fchownat";

#[tokio::test]
async fn snapshot_whose_writes_fail_leaves_the_sandbox_running_and_nothing_behind() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    if !is_root() || engine() != "qemu" {
        skip("failing writes", "strace needs root, and the files are those of QEMU snapshots");
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    client.create(&named("dev")).await.unwrap();
    shell(client, "dev", LEAVE).await;
    let directory = daemon.sandbox_directories().remove(0);
    let vmm = vmm_pid(&directory).unwrap();
    let entries = || {
        let entries = std::fs::read_dir(&directory).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = entries();
    let trace = daemon.data_dir().join("trace");

    for (whose, calls, file) in FAILING_WRITES {
        if calls == CHOWN && !can_use_users() {
            skip("a failing chown", "the VMs of this daemon run as the daemon's user");
            continue;
        }
        let pid = if whose == "vmm" { vmm } else { daemon.pid() };
        // Joining an empty name would add a slash, and strace would not match the directory.
        let path = if file.is_empty() { directory.clone() } else { directory.join(file) };
        let failing = FailingCalls::begin(pid, calls, &path, &trace).await;
        let refused = client.stop("dev").await;
        let failed = failing.end().await;

        let what = format!("{calls} of the {whose}, {file}");
        assert_eq!(code_of(&refused.unwrap_err()), Some(ErrorCode::Internal), "{what}");
        assert!(failed > 0, "{what}");
        assert_eq!(client.inspect("dev").await.unwrap().thermal.as_deref(), Some("hot"), "{what}");
        assert_eq!(shell(client, "dev", FIND).await, FOUND, "{what}");
        assert_eq!(entries(), before, "{what}");
    }
    client.stop("dev").await.unwrap();
    client.start("dev", &StartSandbox::default()).await.unwrap();
    assert_eq!(shell(client, "dev", FIND).await, FOUND);
}

#[tokio::test]
async fn memory_is_reserved_and_a_paused_sandbox_releases_it() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let config = "memory_budget_mb: 1400\nready_vmms: 0\n";
    let daemon = TestDaemon::start_with(with_config(config)).await;
    let client = &daemon.client;
    for name in ["one", "two"] {
        client.create(&named(name)).await.unwrap();
        shell(client, name, LEAVE).await;
    }

    let refused = client.create(&named("three")).await.unwrap_err();
    assert_eq!(code_of(&refused), Some(ErrorCode::Busy));
    let too_large = CreateSandbox { memory_mb: Some(4096), ..named("large") };
    let refused = client.create(&too_large).await.unwrap_err();
    assert_eq!(code_of(&refused), Some(ErrorCode::BadRequest));
    assert_eq!(client.list().await.unwrap().len(), 2);

    client.pause("one").await.unwrap();
    client.create(&named("three")).await.unwrap();
    assert_eq!(client.inspect("one").await.unwrap().thermal.as_deref(), Some("cold"));
    client.pause("two").await.unwrap();
    assert_eq!(shell(client, "one", FIND).await, FOUND);
}

#[tokio::test]
async fn named_snapshot_outlives_its_sandbox_and_its_copies() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let mut daemon = TestDaemon::start().await;
    let client = daemon.client.clone();
    client.create(&named("dev")).await.unwrap();
    shell(&client, "dev", LEAVE).await;
    shell(&client, "dev", "echo disk >/workspace/file").await;
    let name = |name: &str| CreateSnapshot { name: name.to_owned() };

    let snapshot = client.create_snapshot("dev", &name("ready")).await.unwrap();
    shell(&client, "dev", "echo later | tee /workspace/file >/dev/shm/ram").await;
    let taken = client.create_snapshot("dev", &name("ready")).await.unwrap_err();
    assert_eq!(code_of(&taken), Some(ErrorCode::NameTaken));
    assert_eq!((snapshot.sandbox.as_str(), snapshot.kind.as_str()), ("dev", "diff"));
    client.destroy("dev").await.unwrap();
    daemon.terminate().await;
    daemon.serve().await;

    assert_eq!(client.list_snapshots().await.unwrap(), [snapshot]);
    for copy in ["one", "two"] {
        let request = ResumeSnapshot { name: Some(copy.into()), ..Default::default() };
        let sandbox = client.resume_snapshot("ready", &request).await.unwrap();
        assert!(sandbox.origin.starts_with("snapshot "), "{}", sandbox.origin);
        assert_eq!(shell(&client, copy, FIND).await, FOUND);
        assert_eq!(
            shell(&client, copy, "cat /workspace/file; hostname").await,
            format!("disk\n{copy}\n")
        );
    }
    client.create_snapshot("one", &name("second")).await.unwrap();
    client.delete_snapshot("ready").await.unwrap();
    let gone = client.resume_snapshot("ready", &ResumeSnapshot::default()).await.unwrap_err();
    assert_eq!(code_of(&gone), Some(ErrorCode::NotFound));
    client.stop("two").await.unwrap();
    client.start("two", &StartSandbox::default()).await.unwrap();
    assert_eq!(shell(&client, "two", FIND).await, FOUND);
    // A second generation works after everything of the first is gone.
    client.destroy("one").await.unwrap();
    let request = ResumeSnapshot { name: Some("three".into()), ..Default::default() };
    client.resume_snapshot("second", &request).await.unwrap();
    assert_eq!(shell(&client, "three", FIND).await, FOUND);
    client.delete_snapshot("second").await.unwrap();
    assert_eq!(std::fs::read_dir(daemon.data_dir().join("snapshots")).unwrap().count(), 0);
}

#[tokio::test]
async fn sandbox_keeps_its_disk_through_more_snapshots_than_layers() {
    /// More than the layers that a disk may have with any engine.
    const ROUNDS: usize = 70;
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    client.create(&named("dev")).await.unwrap();
    let name = |name: String| CreateSnapshot { name };
    let lines = |count| (0..count).map(|round| format!("{round}\n")).collect::<String>();

    for round in 0..ROUNDS {
        shell(client, "dev", &format!("echo {round} >>/workspace/rounds")).await;
        client.create_snapshot("dev", &name(format!("at-{round}"))).await.unwrap();
        // One snapshot is kept, and the layers that it uses are merged later.
        if round != ROUNDS / 2 {
            client.delete_snapshot(&format!("at-{round}")).await.unwrap();
        }
    }

    assert_eq!(shell(client, "dev", "cat /workspace/rounds").await, lines(ROUNDS));
    client.stop("dev").await.unwrap();
    client.start("dev", &StartSandbox::default()).await.unwrap();
    assert_eq!(shell(client, "dev", "cat /workspace/rounds").await, lines(ROUNDS));
    let request = ResumeSnapshot { name: Some("then".into()), ..Default::default() };
    client.resume_snapshot(&format!("at-{}", ROUNDS / 2), &request).await.unwrap();
    assert_eq!(shell(client, "then", "cat /workspace/rounds").await, lines(ROUNDS / 2 + 1));
    let files = std::fs::read_dir(&daemon.sandbox_directories()[0]).unwrap().count();
    assert!(files < ROUNDS, "{files} files");
}
