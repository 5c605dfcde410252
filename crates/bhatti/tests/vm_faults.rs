//! The daemon or a VMM dies at each step of a sandbox's transitions. Completed work is not lost,
//! nothing is left over, and the sandbox can be used or booted again.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use bhatti_api::{CreateSandbox, CreateSnapshot, ForkSandbox, StartSandbox};
use bhatti_client::Client;
use bhatti_testkit::{Feature, Serve, TestDaemon, named, needs, run, shell, wait_for};

const LEAVE: &str =
    "echo marker >/dev/shm/ram; sleep 100000 >/dev/null 2>&1 & echo $! >/dev/shm/pid";
const FIND: &str = "cat /dev/shm/ram; kill -0 $(cat /dev/shm/pid) && echo alive";
const FOUND: &str = "marker\nalive\n";

/// Starts a daemon without spares, so that every VMM belongs to a sandbox.
async fn daemon() -> TestDaemon {
    let config = "ready_vmms: 0\n".to_owned();
    TestDaemon::start_with(Serve { config, ..Serve::default() }).await
}

/// Starts a daemon with a sandbox that has a marker and a process, and restarts it with `fault`.
async fn with_sandbox(fault: &str) -> TestDaemon {
    let mut daemon = daemon().await;
    daemon.client.create(&named("dev")).await.unwrap();
    shell(&daemon.client, "dev", LEAVE).await;
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.fault = bhatti_testkit::fault!(fault)).await;
    daemon
}

/// Attempts an operation. It may fail, because the daemon or the VMM dies during it.
async fn attempt(client: &Client, what: &str) {
    match what {
        "pause" => drop(client.pause("dev").await),
        "resume" => {
            drop(client.pause("dev").await);
            drop(client.resume("dev").await);
        }
        "stop" => drop(client.stop("dev").await),
        "start" => {
            drop(client.stop("dev").await);
            drop(client.start("dev", &StartSandbox::default()).await);
        }
        "fork" => {
            let fork = ForkSandbox { name: Some("fork".into()), ..Default::default() };
            drop(client.fork("dev", &fork).await);
        }
        "snapshot" => {
            let request = CreateSnapshot { name: "named".into() };
            drop(client.create_snapshot("dev", &request).await);
        }
        "create" => drop(client.create(&named("other")).await),
        "boot" => {
            let boot = CreateSandbox { cold_boot: true, ..named("other") };
            drop(client.create(&boot).await);
        }
        "destroy" => drop(client.destroy("dev").await),
        _ => panic!("{what}"),
    }
}

/// Starts the sandbox if it is stopped.
async fn bring_back(client: &Client) {
    if client.inspect("dev").await.unwrap().status == "stopped" {
        client.start("dev", &StartSandbox::default()).await.unwrap();
    }
}

/// Checks that only the files and processes of `sandboxes` are left, and then destroys them.
async fn nothing_is_left(daemon: &TestDaemon, sandboxes: &[&str]) {
    let mut names: Vec<_> =
        daemon.client.list().await.unwrap().into_iter().map(|sandbox| sandbox.name).collect();
    names.sort();
    assert_eq!(names, sandboxes);
    assert_eq!(daemon.sandbox_directories().len(), sandboxes.len());
    assert_eq!(std::fs::read_dir(daemon.data_dir().join("snapshots")).unwrap().count(), 0);
    wait_for("a VMM for each sandbox", || daemon.all_vmm_pids().len() == sandboxes.len()).await;
    for directory in daemon.sandbox_directories() {
        let left = ["snapshot", "snapshot.used", "snapshot.tmp"];
        let left: Vec<_> = left.iter().filter(|name| directory.join(name).exists()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    for name in sandboxes {
        daemon.client.destroy(name).await.unwrap();
    }
    wait_for("the VMMs' end", || daemon.all_vmm_pids().is_empty()).await;
    assert!(daemon.sandbox_directories().is_empty());
}

/// Ends the daemon at a step, and checks that the next daemon finds the sandbox with its memory and
/// processes.
async fn daemon_dies(step: &str, during: &str) {
    let mut daemon = with_sandbox(&format!("daemon:{step}")).await;
    attempt(&daemon.client, during).await;
    daemon.ended().await;

    daemon.serve_with(|serve| serve.fault = None).await;

    bring_back(&daemon.client).await;
    assert_eq!(shell(&daemon.client, "dev", FIND).await, FOUND, "{step} of {during}");
    nothing_is_left(&daemon, &["dev"]).await;
}

#[tokio::test]
async fn daemon_that_dies_while_it_pauses_or_resumes_loses_nothing() {
    daemon_dies("paused", "pause").await;
    daemon_dies("resumed", "resume").await;
}

#[tokio::test]
async fn daemon_that_dies_while_it_stops_loses_nothing() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    for step in ["stop_noted", "paused", "saved", "ended"] {
        daemon_dies(step, "stop").await;
    }
}

#[tokio::test]
async fn daemon_that_dies_while_it_starts_loses_nothing() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    for step in ["start_noted", "staged", "loaded", "consumed", "woken"] {
        daemon_dies(step, "start").await;
    }
}

#[tokio::test]
async fn daemon_that_dies_while_it_forks_or_creates_loses_nothing() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    for step in ["captured", "frozen", "inserted", "running"] {
        daemon_dies(step, "fork").await;
    }
    for step in ["inserted", "running"] {
        daemon_dies(step, "create").await;
    }
    for step in ["captured", "unnamed"] {
        daemon_dies(step, "snapshot").await;
    }
}

#[tokio::test]
async fn daemon_that_dies_while_it_boots_a_sandbox_loses_nothing() {
    for step in ["inserted", "running"] {
        daemon_dies(step, "boot").await;
    }
}

#[tokio::test]
async fn refused_cold_boot_keeps_the_saved_memory() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = daemon().await;
    daemon.client.create(&named("dev")).await.unwrap();
    shell(&daemon.client, "dev", LEAVE).await;
    daemon.client.stop("dev").await.unwrap();
    // The daemon cannot write the file that marks a boot in progress.
    let mark = daemon.sandbox_directories()[0].join("booting");
    std::fs::create_dir(&mark).unwrap();

    daemon.client.start("dev", &StartSandbox { cold_boot: true }).await.unwrap_err();

    std::fs::remove_dir(&mark).unwrap();
    daemon.client.start("dev", &StartSandbox::default()).await.unwrap();
    assert_eq!(shell(&daemon.client, "dev", FIND).await, FOUND);
    nothing_is_left(&daemon, &["dev"]).await;
}

/// Makes the guest of a sandbox reset its machine, as `reboot -f` does.
async fn reboot(client: &Client) {
    let reset = "import os, ctypes; os.sync(); ctypes.CDLL(None).reboot(0x01234567)";
    // The connection ends with the VM.
    drop(run(client, "dev", &["sudo", "python3", "-c", reset]).await);
}

/// Ends the daemon when the VM of a sandbox has booted again and its guest has no settings yet.
///
/// The next daemon must leave the sandbox in `status`.
async fn daemon_dies_while_it_boots_again(begin: impl AsyncFnOnce(&Client), status: &str) {
    let mut daemon = daemon().await;
    let env = [("COLOR".to_owned(), "red".to_owned())].into();
    daemon.client.create(&CreateSandbox { env, ..named("dev") }).await.unwrap();
    shell(&daemon.client, "dev", "echo kept >/workspace/file; sync").await;
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.fault = bhatti_testkit::fault!("daemon:running")).await;
    begin(&daemon.client).await;
    daemon.ended().await;

    daemon.serve_with(|serve| serve.fault = None).await;

    assert_eq!(daemon.client.inspect("dev").await.unwrap().status, status);
    if status == "stopped" {
        daemon.client.start("dev", &StartSandbox { cold_boot: true }).await.unwrap();
    }
    let seen = shell(&daemon.client, "dev", "cat /workspace/file; hostname; echo $COLOR").await;
    assert_eq!(seen, "kept\ndev\nred\n");
    // From now on, the sandbox outlives the daemon again.
    shell(&daemon.client, "dev", LEAVE).await;
    daemon.kill().await;
    daemon.serve().await;
    assert_eq!(shell(&daemon.client, "dev", FIND).await, FOUND);
    nothing_is_left(&daemon, &["dev"]).await;
}

#[tokio::test]
async fn next_daemon_boots_a_guest_whose_reboot_was_interrupted() {
    if needs(Feature::OwnKernel) {
        daemon_dies_while_it_boots_again(reboot, "running").await;
    }
}

#[tokio::test]
async fn next_daemon_boots_a_guest_that_rebooted_while_its_daemon_was_stopped() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let mut daemon = daemon().await;
    daemon.client.create(&named("dev")).await.unwrap();
    shell(&daemon.client, "dev", "echo kept >/workspace/file").await;
    let mark = daemon.sandbox_directories()[0].join("booting");
    let client = daemon.client.clone();
    let rebooting = tokio::spawn(async move { reboot(&client).await });
    wait_for("the boot", || mark.exists()).await;

    // A stopping daemon waits for requests in progress, but not for a boot that no request waits
    // for.
    daemon.terminate().await;
    daemon.serve().await;

    rebooting.await.unwrap();
    assert_eq!(shell(&daemon.client, "dev", "cat /workspace/file").await, "kept\n");
    assert!(!mark.exists());
    nothing_is_left(&daemon, &["dev"]).await;
}

#[tokio::test]
async fn next_daemon_ends_an_interrupted_cold_boot() {
    let start = async |client: &Client| {
        drop(client.stop("dev").await);
        drop(client.start("dev", &StartSandbox { cold_boot: true }).await);
    };
    daemon_dies_while_it_boots_again(start, "stopped").await;
}

/// Saves the sandbox under a name until the fault occurs. Returns the content that the guest has
/// written to its disk.
async fn saved_until_its_layers_are_merged(daemon: &TestDaemon) -> String {
    let mut written = String::new();
    for round in 0.. {
        shell(&daemon.client, "dev", &format!("echo {round} >>/workspace/rounds; sync")).await;
        written += &format!("{round}\n");
        let request = CreateSnapshot { name: "named".into() };
        if daemon.client.create_snapshot("dev", &request).await.is_err() {
            break;
        }
        daemon.client.delete_snapshot("named").await.unwrap();
    }
    written
}

#[tokio::test]
async fn daemon_that_dies_when_a_disk_is_merged_loses_nothing() {
    if !needs(Feature::LayeredDisks) {
        return;
    }
    let mut daemon = with_sandbox("daemon:merged").await;
    let written = saved_until_its_layers_are_merged(&daemon).await;
    daemon.ended().await;

    daemon.serve_with(|serve| serve.fault = None).await;

    assert_eq!(shell(&daemon.client, "dev", "cat /workspace/rounds").await, written);
    assert_eq!(shell(&daemon.client, "dev", FIND).await, FOUND);
    nothing_is_left(&daemon, &["dev"]).await;
}

#[tokio::test]
async fn vmm_that_dies_when_a_disk_is_merged_loses_no_disk_content() {
    if !needs(Feature::LayeredDisks) {
        return;
    }
    let mut daemon = with_sandbox("vmm:merged").await;
    let written = saved_until_its_layers_are_merged(&daemon).await;
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.fault = None).await;

    assert_eq!(daemon.client.inspect("dev").await.unwrap().status, "failed");
    daemon.client.start("dev", &StartSandbox { cold_boot: true }).await.unwrap();
    assert_eq!(shell(&daemon.client, "dev", "cat /workspace/rounds").await, written);
    nothing_is_left(&daemon, &["dev"]).await;
}

#[tokio::test]
async fn next_daemon_finishes_an_interrupted_destroy() {
    for step in ["destroy_noted", "removed"] {
        let mut daemon = with_sandbox(&format!("daemon:{step}")).await;
        attempt(&daemon.client, "destroy").await;
        daemon.ended().await;

        daemon.serve_with(|serve| serve.fault = None).await;

        nothing_is_left(&daemon, &[]).await;
    }
}

/// Ends the VMM at a step. If the memory is on disk by then, nothing is lost; otherwise the sandbox
/// fails and can be booted from its disk.
async fn vmm_dies(step: &str, during: &str, memory_is_safe: bool) {
    let mut daemon = with_sandbox(&format!("vmm:{step}")).await;
    shell(&daemon.client, "dev", "echo on disk >/workspace/file; sync").await;
    attempt(&daemon.client, during).await;
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.fault = None).await;
    let client = &daemon.client;

    let state = client.inspect("dev").await.unwrap();
    if memory_is_safe {
        bring_back(client).await;
        assert_eq!(shell(client, "dev", FIND).await, FOUND, "{step} of {during}: {state:?}");
    } else {
        assert_eq!(state.status, "failed", "{step} of {during}");
        let refused = client.start("dev", &StartSandbox::default()).await.unwrap_err();
        assert!(refused.to_string().contains("failed"), "{refused}");
        client.start("dev", &StartSandbox { cold_boot: true }).await.unwrap();
        assert_eq!(shell(client, "dev", "cat /workspace/file; ls /dev/shm").await, "on disk\n");
    }
    nothing_is_left(&daemon, &["dev"]).await;
}

#[tokio::test]
async fn vmm_that_dies_before_its_memory_is_saved_leaves_a_disk_to_boot_from() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    vmm_dies("paused", "stop", false).await;
    vmm_dies("resumed", "resume", false).await;
    vmm_dies("captured", "fork", false).await;
    vmm_dies("woken", "start", false).await;
}

#[tokio::test]
async fn vmm_that_dies_after_its_memory_is_saved_loses_nothing() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    vmm_dies("saved", "stop", true).await;
    vmm_dies("staged", "start", true).await;
    vmm_dies("loaded", "start", true).await;
    vmm_dies("consumed", "start", true).await;
}

#[tokio::test]
async fn fork_whose_vmm_dies_leaves_its_parent_alone() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    for step in ["inserted", "running"] {
        let mut daemon = with_sandbox(&format!("vmm:{step}")).await;
        attempt(&daemon.client, "fork").await;
        daemon.terminate().await;
        daemon.serve_with(|serve| serve.fault = None).await;

        assert_eq!(shell(&daemon.client, "dev", FIND).await, FOUND, "{step}");
        if step == "running" {
            nothing_is_left(&daemon, &["dev"]).await;
        }
    }
}
