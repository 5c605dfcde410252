//! Sandboxes in real VMs: identity, commands, names, recovery and destruction.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::io::{Read, Write};
use std::time::Duration;

use bhatti_api::{CreateSandbox, CreateUser, ErrorCode, StartSandbox};
use bhatti_client::{Client, ClientError, CommandEvent, EventFilter};
use bhatti_testkit::{
    Api, Feature, LIMIT, Ran, Serve, TestDaemon, change_store, code_of, collect, engine,
    json_message, kill_process, named, needs, replace, run, shell, start, vmm_pid, wait_for,
};
use tokio::time::{Instant, timeout};

#[tokio::test]
async fn sandbox_is_a_vm_of_the_requested_size() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let request = CreateSandbox {
        name: Some("Real.vm_1".into()),
        cpus: Some(2),
        memory_mb: Some(384),
        env: [("GREETING".to_owned(), "hello = world".to_owned())].into(),
        ..CreateSandbox::default()
    };
    let sandbox = daemon.client.create(&request).await.unwrap();
    assert_eq!((&*sandbox.status, sandbox.cpus, sandbox.memory_mb), ("running", 2, 384));

    let script = r#"uname -r; cat /proc/sys/kernel/random/boot_id; cat /proc/1/comm; nproc; awk '/MemTotal/{print $2}' /proc/meminfo; hostname; echo "$GREETING"; pwd; ulimit -Sn; ulimit -Hn"#;
    let facts = shell(&daemon.client, "Real.vm_1", script).await;
    let facts: Vec<&str> = facts.lines().collect();

    // The host may run the same kernel version, so the boot ids are compared.
    let host_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_ne!(facts[1], host_boot.trim());
    assert!(facts[0].contains("cloud"), "{}", facts[0]);
    assert_eq!(
        [facts[2], facts[3], facts[5], facts[6], facts[7], facts[8], facts[9]],
        ["lohar", "2", "Real.vm_1", "hello = world", "/workspace", "1024", "524288"]
    );
    // The kernel reserves some of the memory.
    let memory_kib: u64 = facts[4].parse().unwrap();
    assert!((320 * 1024..=384 * 1024).contains(&memory_kib), "{memory_kib} KiB");
    let python = run(&daemon.client, &sandbox.id, &["python3", "-c", "print(6*7)"]).await.unwrap();
    assert_eq!(python.stdout, b"42\n");
}

#[tokio::test]
async fn commands_carry_bytes_codes_and_errors_unchanged() {
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let client = &daemon.client;

    // 64 MiB of all byte values, in and out.
    let bytes: Vec<u8> =
        (0..64 << 20).map(|at: u32| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect();
    let (mut input, output) = client.start_command("dev", &start(&["cat"])).await.unwrap();
    let sent = bytes.clone();
    let sending = tokio::spawn(async move {
        input.write(&sent).await.unwrap();
        input.end().await.unwrap();
        input
    });
    let echoed = timeout(5 * LIMIT, collect(output)).await.unwrap().unwrap();
    sending.await.unwrap();
    assert!(echoed.stdout == bytes, "{} bytes came back", echoed.stdout.len());

    let apart =
        run(client, "dev", &["sh", "-c", "printf 'o\\000\\377'; printf 'e\\376' >&2; exit 42"])
            .await
            .unwrap();
    assert_eq!(apart, Ran { stdout: b"o\0\xff".into(), stderr: b"e\xfe".into(), code: 42 });

    unread_input_does_not_hold_up_an_answer_in_one_piece(&daemon).await;
    let missing = run(client, "dev", &["no-such-program"]).await.unwrap_err();
    assert_eq!(code_of(&missing), Some(ErrorCode::CommandNotFound));
    let refused = run(client, "dev", &["/etc/passwd"]).await.unwrap_err();
    assert_eq!(code_of(&refused), Some(ErrorCode::CommandNotExecutable));
    let empty = run(client, "dev", &[]).await.unwrap_err();
    assert_eq!(code_of(&empty), Some(ErrorCode::BadRequest));
}

async fn unread_input_does_not_hold_up_an_answer_in_one_piece(daemon: &TestDaemon) {
    let body =
        serde_json::json!({ "cmd": ["echo", "done"], "stdin": "x".repeat(1_000_000) }).to_string();
    for accept in ["application/json", "application/x-ndjson"] {
        let stream = bhatti_host::socket::try_connect_in(daemon.data_dir(), "bhatti.sock");
        let mut stream = stream.unwrap();
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let length = body.len();
        let head = format!(
            "POST /sandboxes/dev/exec HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n"
        );
        let request = format!("{head}Content-Length: {length}\r\n\r\n{body}");
        let answer = tokio::task::spawn_blocking(move || {
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        let answer = answer.await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("done\\n"), "{answer}");
    }
}

#[tokio::test]
async fn name_is_taken_until_its_sandbox_is_destroyed() {
    let daemon = TestDaemon::start().await;
    let first = daemon.client.create(&named("dev")).await.unwrap();

    let taken = daemon.client.create(&named("dev")).await.unwrap_err();
    assert_eq!(code_of(&taken), Some(ErrorCode::NameTaken));
    assert_eq!(daemon.client.list().await.unwrap().len(), 1);

    // The second of two concurrent destroys finds no sandbox.
    let (one, two) = tokio::join!(daemon.client.destroy("dev"), daemon.client.destroy("dev"));
    let late = one.and(two).unwrap_err();
    assert_eq!(code_of(&late), Some(ErrorCode::NotFound), "{late}");
    let second = daemon.client.create(&named("dev")).await.unwrap();
    assert_ne!(first.id, second.id);
}

#[tokio::test]
async fn sandbox_of_one_user_is_not_found_by_another() {
    let config = "listen: 127.0.0.1:0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let log = daemon.log();
    let address = log.rsplit("address=").next().unwrap().lines().next().unwrap().trim().to_owned();
    let user = daemon
        .client
        .create_user(&CreateUser { name: "alice".into(), ..CreateUser::default() })
        .await
        .unwrap();
    let alice = Client::http(&format!("http://{address}"), &user.api_key).unwrap();
    let hers = alice.create(&named("dev")).await.unwrap();

    for id_or_name in ["dev", &hers.id] {
        let admin = &daemon.client;
        assert_eq!(
            code_of(&admin.inspect(id_or_name).await.unwrap_err()),
            Some(ErrorCode::NotFound)
        );
        assert_eq!(
            code_of(&admin.destroy(id_or_name).await.unwrap_err()),
            Some(ErrorCode::NotFound)
        );
        assert_eq!(
            code_of(&run(admin, id_or_name, &["true"]).await.unwrap_err()),
            Some(ErrorCode::NotFound)
        );
    }
    assert_eq!(daemon.client.list().await.unwrap(), []);
    assert_eq!(run(&alice, "dev", &["true"]).await.unwrap().code, 0);
}

#[tokio::test]
async fn killed_vmm_ends_commands_and_its_sandbox_can_be_destroyed() {
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let (_input, mut output) = daemon
        .client
        .start_command("dev", &start(&["sh", "-c", "echo up; sleep 1000"]))
        .await
        .unwrap();
    assert_eq!(output.next().await.unwrap(), CommandEvent::Stdout("up\n".into()));

    kill_process(daemon.vmm_pids()[0]);
    let killed = Instant::now();
    let error = timeout(LIMIT, output.next()).await.unwrap().unwrap_err();

    assert_eq!(code_of(&error), Some(ErrorCode::ConnectionLost));
    assert!(killed.elapsed() < Duration::from_secs(10), "the client waited {:?}", killed.elapsed());
    let mut status = String::new();
    timeout(LIMIT, async {
        while status != "failed" {
            status = daemon.client.inspect("dev").await.unwrap().status;
        }
    })
    .await
    .unwrap();
    // A request that came before the row was written may still find the connection lost.
    let refused = async {
        let is_refused = |error| code_of(&error) == Some(ErrorCode::WrongState);
        while !run(&daemon.client, "dev", &["true"]).await.is_err_and(is_refused) {}
    };
    timeout(LIMIT, refused).await.unwrap();
    daemon.client.destroy("dev").await.unwrap();
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn sandbox_whose_directory_was_removed_can_be_destroyed_with_its_vm() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let pid = vmm_pid(&daemon.sandbox_directories()[0]).unwrap();
    for directory in daemon.sandbox_directories() {
        if vmm_pid(&directory) == Some(pid) {
            fs::remove_dir_all(directory).unwrap();
        }
    }

    daemon.client.destroy("dev").await.unwrap();

    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "the VM still runs");
}

#[tokio::test]
async fn guest_that_reboots_itself_is_booted_from_its_disk() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let before =
        shell(&daemon.client, "dev", &format!("echo kept >/workspace/f; sync; {boot}")).await;
    let reboot = "import ctypes; ctypes.CDLL(None).reboot(0x01234567)";
    let api = Api::admin(&daemon);
    let service = "echo run >>/workspace/runs; sync; exec sleep 1000";
    let attached = serde_json::json!({ "cmd": ["sh", "-c", service], "restart": true });
    assert_eq!(api.call("POST", "/sandboxes/dev/exec", &attached).await.status, 400);
    let job = ["exec", "--detach", "--restart", "dev", "--", "sh", "-c", service];
    assert!(daemon.cli(&job).status().await.unwrap().success());
    let wait_for_runs =
        |runs: u32| format!("until [ $(wc -l </workspace/runs) = {runs} ]; do sleep 0.05; done");
    shell(&daemon.client, "dev", &wait_for_runs(1)).await;
    let exec = serde_json::json!({ "cmd": ["python3", "-c", reboot], "user": "root" });
    drop(api.call("POST", "/sandboxes/dev/exec", &exec).await);

    // A request during the reboot waits for the boot, or finds that the old VM has just ended.
    let mut after = String::new();
    timeout(LIMIT, async {
        while after.is_empty() || after.ends_with(&before) {
            if let Ok(ran) =
                run(&daemon.client, "dev", &["sh", "-c", &format!("cat /workspace/f; {boot}")])
                    .await
            {
                after = String::from_utf8(ran.stdout).unwrap();
            }
        }
    })
    .await
    .unwrap();

    assert!(after.starts_with("kept\n"), "{after}");
    let events = daemon.client.list_events(&EventFilter::default()).await.unwrap();
    assert!(events.iter().any(|event| event.kind == "sandbox.rebooted"));
    shell(&daemon.client, "dev", &wait_for_runs(2)).await;
    assert_eq!(api.call("POST", "/sandboxes/dev/stop", &serde_json::json!({})).await.status, 200);
    daemon.client.start("dev", &StartSandbox { cold_boot: true }).await.unwrap();
    shell(&daemon.client, "dev", &wait_for_runs(3)).await;
    let jobs = api.get("/sandboxes/dev/jobs").await.json();
    assert_eq!((&jobs[0]["running"], &jobs[0]["restart"]), (&true.into(), &true.into()), "{jobs}");
}

#[tokio::test]
async fn sandbox_with_a_damaged_row_is_reported_and_can_be_destroyed() {
    let mut daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    daemon.terminate().await;
    change_store(daemon.data_dir(), "UPDATE sandboxes SET memory_mib = 1");
    daemon.serve().await;

    let refused = daemon.client.inspect("dev").await.unwrap_err();
    let destroyed = daemon.cli(&["destroy", "--yes", "dev"]).output().await.unwrap();

    assert_eq!(code_of(&refused), Some(ErrorCode::DamagedRow), "{refused}");
    assert!(destroyed.status.success(), "{}", String::from_utf8_lossy(&destroyed.stderr));
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
    wait_for("no VMM except the spare", || daemon.all_vmm_pids().len() <= 1).await;
}

#[tokio::test]
async fn restart_job_is_on_disk_before_its_start_is_answered() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let service = "touch /dev/shm/ran; exec sleep 1000";
    let job = ["exec", "--detach", "--restart", "dev", "--", "sh", "-c", service];
    assert!(daemon.cli(&job).status().await.unwrap().success());

    // This loses everything that the guest has not written to its disk.
    kill_process(vmm_pid(&daemon.sandbox_directories()[0]).unwrap());
    let failed = async { while daemon.client.inspect("dev").await.unwrap().status != "failed" {} };
    timeout(LIMIT, failed).await.unwrap();
    daemon.client.start("dev", &StartSandbox { cold_boot: true }).await.unwrap();

    shell(&daemon.client, "dev", "until [ -e /dev/shm/ran ]; do sleep 0.05; done").await;
}

#[tokio::test]
async fn deleted_guest_files_free_host_disk_space() {
    if !needs(Feature::LayeredDisks) {
        return;
    }
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let used = || -> u64 {
        let directories = daemon.sandbox_directories();
        let files = directories.iter().flat_map(|it| fs::read_dir(it).unwrap());
        let layers = files
            .map(|it| it.unwrap().path())
            .filter(|it| it.extension().is_some_and(|it| it == "qcow2"));
        layers
            .map(|it| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(it).unwrap()) * 512)
            .sum::<u64>()
            >> 20
    };
    shell(&daemon.client, "dev", "head -c 8M /dev/urandom >/dev/shm/p; for i in 1 2 3 4 5 6 7 8 9 10; do cat /dev/shm/p; done >/workspace/f; sync").await;
    assert!(used() > 80, "{} MiB", used());

    shell(&daemon.client, "dev", "rm /workspace/f; sync").await;

    // The guest's kernel discards after the commit of its journal.
    wait_for("the host's file shrinks", || used() < 40).await;
}

#[tokio::test]
async fn kernel_parameters_suit_editors_and_ping() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let read = "cd /proc/sys && cat fs/inotify/max_user_watches fs/inotify/max_user_instances net/ipv4/ping_group_range";
    assert_eq!(shell(&daemon.client, "dev", read).await, "524288\n1024\n0\t2147483647\n");
    let ping =
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)";
    let ran = run(&daemon.client, "dev", &["python3", "-c", ping]).await.unwrap();
    assert_eq!(ran.code, 0, "{ran:?}");
}

#[tokio::test]
async fn killed_daemon_finds_its_sandboxes_again() {
    let mut daemon = TestDaemon::start().await;
    let kept = daemon.client.create(&named("kept")).await.unwrap();
    daemon.client.create(&named("lost")).await.unwrap();
    shell(
        &daemon.client,
        "kept",
        "echo marker >/dev/shm/ram; sleep 1000 >/dev/null 2>&1 & echo $! >/dev/shm/pid",
    )
    .await;
    let lost =
        daemon.data_dir().join("sandboxes").join(daemon.client.inspect("lost").await.unwrap().id);
    // A command that runs while the daemon dies must not garble the channel for later commands.
    let (mut input, _output) = daemon.client.start_command("kept", &start(&["cat"])).await.unwrap();
    drop(timeout(Duration::from_millis(200), input.write(&vec![0xf7; 8 << 20])).await);

    daemon.kill().await;
    kill_process(vmm_pid(&lost).unwrap());
    daemon.serve().await;

    let found = daemon.client.inspect("kept").await.unwrap();
    assert_eq!(found, kept);
    assert_eq!(
        shell(
            &daemon.client,
            "kept",
            "cat /dev/shm/ram; kill -0 $(cat /dev/shm/pid) && echo alive"
        )
        .await,
        "marker\nalive\n"
    );
    assert_eq!(daemon.client.inspect("lost").await.unwrap().status, "failed");
    daemon.client.destroy("lost").await.unwrap();
    daemon.client.destroy("kept").await.unwrap();
    assert!(daemon.vmm_pids().is_empty());
}

#[tokio::test]
async fn daemon_killed_during_a_creation_leaves_nothing_half_made() {
    let mut daemon = TestDaemon::start().await;
    let client = daemon.client.clone();
    let creating = tokio::spawn(async move { client.create(&named("dev")).await });
    wait_for("the VMM", || !daemon.vmm_pids().is_empty()).await;
    let vmm = daemon.vmm_pids()[0];

    daemon.kill().await;
    creating.await.unwrap().unwrap_err();
    daemon.serve().await;

    // The creation may have completed before its response was lost. Then the sandbox exists and
    // works.
    let listed = daemon.client.list().await.unwrap();
    for sandbox in listed.iter().filter(|sandbox| sandbox.status == "running") {
        assert_eq!(shell(&daemon.client, &sandbox.id, "echo whole").await, "whole\n");
        daemon.client.destroy(&sandbox.id).await.unwrap();
    }
    wait_for("the VMM's end", || !std::path::Path::new(&format!("/proc/{vmm}")).exists()).await;
    assert_eq!(daemon.client.list().await.unwrap(), []);
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
    daemon.client.create(&named("dev")).await.unwrap();
}

#[tokio::test]
async fn failed_boot_is_an_error_with_the_end_of_the_console() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    // The agent's file is not a program, so the kernel finds no init and panics.
    let bin = tempfile::tempdir().unwrap();
    std::fs::copy(bhatti_testkit::dist("bhatti"), bin.path().join("bhatti")).unwrap();
    std::fs::write(bin.path().join("lohar"), "no program").unwrap();
    let daemon =
        TestDaemon::start_with(Serve { program: bin.path().join("bhatti"), ..Serve::default() })
            .await;

    let error = timeout(LIMIT, daemon.client.create(&named("dev"))).await.unwrap().unwrap_err();

    let ClientError::Refused(body) = error else { panic!("{error}") };
    assert_eq!(body.code, ErrorCode::BootFailed);
    assert!(body.error.contains("Kernel panic"), "{}", body.error);
    assert_eq!(daemon.client.list().await.unwrap(), []);
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn four_hundred_quiet_commands_leave_room_for_another() {
    let daemon = TestDaemon::start().await;
    let request = CreateSandbox { memory_mb: Some(1024), ..named("dev") };
    daemon.client.create(&request).await.unwrap();
    let command = start(&["sh", "-c", "echo up; exec sleep 1000"]);
    let mut quiet = Vec::new();
    for _ in 0..400 {
        let (input, mut output) = daemon.client.start_command("dev", &command).await.unwrap();
        let up = timeout(LIMIT, output.next()).await.unwrap().unwrap();
        assert_eq!(up, CommandEvent::Stdout("up\n".into()));
        quiet.push((input, output));
    }

    let ran = timeout(LIMIT, run(&daemon.client, "dev", &["echo", "room"])).await.unwrap().unwrap();

    assert_eq!(ran.stdout, b"room\n");
}

#[tokio::test]
async fn halted_guest_is_reported_as_lost_and_can_be_destroyed() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let halt = "import ctypes; ctypes.CDLL(None).reboot(0xcdef0123)";
    let (_input, _output) =
        daemon.client.start_command("dev", &start(&["sudo", "python3", "-c", halt])).await.unwrap();
    // A command that began before the guest halted never ends; a command that begins afterwards is
    // refused.
    let refused = async {
        loop {
            match daemon.client.start_command("dev", &start(&["sleep", "1"])).await {
                Ok((_input, mut output)) => {
                    if let Ok(Err(error)) = timeout(Duration::from_secs(25), output.next()).await {
                        break error;
                    }
                }
                Err(error) => break error,
            }
        }
    };
    let error = timeout(LIMIT, refused).await.unwrap();

    assert_eq!(code_of(&error), Some(ErrorCode::ConnectionLost));
    // Every other operation that a live guest answers at once is refused, too.
    let api = Api::admin(&daemon);
    let get = async |path: &str| api.get(&format!("/sandboxes/dev/{path}")).await.refusal();
    let shell = async {
        let mut socket = api.websocket("/sandboxes/dev/ws", &[]).await.ok().unwrap();
        json_message(&mut socket).await["code"].clone()
    };
    let (sessions, file, ports, shell) =
        tokio::join!(get("sessions"), get("files?path=/etc/hostname"), get("ports"), shell);
    for refusal in [sessions, file, ports] {
        assert_eq!(refusal, (502, "connection_lost".to_owned()));
    }
    assert_eq!(shell, "connection_lost");
    daemon.client.destroy("dev").await.unwrap();
}

#[tokio::test]
async fn process_with_a_reused_vmm_pid_is_left_alone() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let mut daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    let directory = daemon.sandbox_directories().remove(0);
    let record = directory.join("vm.json");
    let mut reused: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    let vmm = daemon.vmm_pids()[0];
    daemon.kill().await;
    kill_process(vmm);
    let mut bystander =
        bhatti_host::process::command("sleep").arg("1000").kill_on_drop(true).spawn().unwrap();
    reused["pid"] = bystander.id().unwrap().into();
    replace(&record, reused.to_string());

    daemon.serve().await;

    let found = daemon.client.inspect("dev").await.unwrap();
    assert_eq!(found.status, "failed");
    daemon.client.destroy("dev").await.unwrap();
    assert!(bystander.try_wait().unwrap().is_none(), "the daemon ended an unrelated process");
    assert!(!directory.exists());
}

#[tokio::test]
async fn restored_older_store_leaves_unknown_sandboxes_alone() {
    let mut daemon = TestDaemon::start().await;
    daemon.client.create(&named("old")).await.unwrap();
    daemon.terminate().await;
    let files = ["state.db", "state.db-wal", "state.db-shm"];
    let older = copy_of(&daemon, &files);
    daemon.serve().await;
    daemon.client.create(&named("new")).await.unwrap();
    shell(&daemon.client, "new", "echo marker >/dev/shm/ram").await;
    daemon.client.destroy("old").await.unwrap();
    daemon.terminate().await;
    let newer = copy_of(&daemon, &files);
    put_copy(&daemon, &files, &older);

    daemon.serve().await;

    // `old`, which the older store has, no longer runs and is shown as failed. `new`, which it does
    // not have, keeps running and is found again with the newer store.
    assert_eq!(daemon.client.inspect("old").await.unwrap().status, "failed");
    assert_eq!(
        code_of(&daemon.client.inspect("new").await.unwrap_err()),
        Some(ErrorCode::NotFound)
    );
    assert!(
        daemon.log().contains("Found a sandbox that the store does not know; it is left alone")
    );
    daemon.terminate().await;
    put_copy(&daemon, &files, &newer);
    daemon.serve().await;
    assert_eq!(shell(&daemon.client, "new", "cat /dev/shm/ram").await, "marker\n");
}

/// Reads the files of a store. No daemon may have it open.
fn copy_of(daemon: &TestDaemon, files: &[&str; 3]) -> [Option<Vec<u8>>; 3] {
    files.map(|name| std::fs::read(daemon.data_dir().join(name)).ok())
}

/// Replaces the files of a store with a copy.
fn put_copy(daemon: &TestDaemon, files: &[&str; 3], copy: &[Option<Vec<u8>>; 3]) {
    for (name, content) in files.iter().zip(copy) {
        let path = daemon.data_dir().join(name);
        drop(std::fs::remove_file(&path));
        if let Some(content) = content {
            std::fs::write(path, content).unwrap();
        }
    }
}

#[tokio::test]
async fn engine_change_with_sandboxes_and_missing_engine_are_refused() {
    let mut daemon = TestDaemon::start().await;
    daemon.client.create(&named("dev")).await.unwrap();
    daemon.terminate().await;
    let config = fs::read_to_string(daemon.data_dir().join("config.yaml")).unwrap();
    let serve = async |config: &str| {
        fs::write(daemon.data_dir().join("config.yaml"), config).unwrap();
        let refused = timeout(LIMIT, daemon.cli(&["serve"]).output()).await.unwrap().unwrap();
        assert!(!refused.status.success());
        String::from_utf8(refused.stderr).unwrap()
    };

    let said = serve("engine: firecracker\nfirecracker: /nowhere/firecracker\n").await;
    assert!(said.contains("`/nowhere/firecracker` is not installed"), "{said}");
    let said = serve("engine: something\n").await;
    assert!(said.contains("config.yaml"), "{said}");
    // The data directory looks as if a daemon with another engine had used it.
    let noted = daemon.data_dir().join("engine");
    assert_eq!(fs::read_to_string(&noted).unwrap(), format!("{}\n", engine()));
    let other = if engine() == "firecracker" { "qemu" } else { "firecracker" };
    fs::write(&noted, format!("{other}\n")).unwrap();
    let said = serve(&config).await;
    let made = format!("1 sandboxes and snapshots were made with the engine `{other}`");
    assert!(said.contains(&made), "{said}");
    assert!(said.contains(&format!("hint: set `engine: {other}`")), "{said}");

    fs::write(noted, engine()).unwrap();
    daemon.serve().await;
    let sandbox = daemon.client.inspect("dev").await.unwrap();
    assert_eq!(sandbox.status, "running", "the refused daemons changed the sandbox");
}

#[tokio::test]
async fn oom_kill_is_an_event_before_and_after_a_restart() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    client.create(&named("dev")).await.unwrap();
    let greedy = ["python3", "-c", "kept = [bytearray(1 << 24) for _ in range(10000)]"];
    let kills = async || {
        let filter =
            EventFilter { kind: Some("sandbox.oom_kill".into()), ..EventFilter::default() };
        client.list_events(&filter).await.unwrap()
    };

    for life in 1..=2 {
        let killed = run(client, "dev", &greedy).await.unwrap();
        assert_eq!(killed.code, 137, "{killed:?}");
        let recorded = async { while kills().await.len() < life {} };
        timeout(LIMIT, recorded).await.expect("the daemon records the OOM kill");
        let events = kills().await;
        let (last, detail) = (&events[life - 1], &events[life - 1].detail);
        assert_eq!(
            (last.sandbox_name.as_deref(), &detail["name"]),
            (Some("dev"), &"python3".into())
        );
        assert!(detail["pid"].as_u64().unwrap() > 1);
        assert!(detail["cgroup"].as_str().unwrap().starts_with("/user"), "{detail}");
        if needs(Feature::SavedMemory) {
            client.stop("dev").await.unwrap();
            client.start("dev", &StartSandbox::default()).await.unwrap();
        }
    }
}
