//! Tests the agent as PID 1 of a real guest.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_agent::{AgentClient, CallError, ExecEvent};
use bhatti_engine::{Disks, Engine, SnapshotRequest, Vm, VmSpec};
use bhatti_host::process::landlock_version;
use bhatti_image::{DEFAULT_IMAGE, ImageStore};
use bhatti_proto::{
    Applied, ConfigFile, ConfigVolume, ExecRequest, GuestConfig, GuestEvent, GuestNetwork,
    Identity, IdentityReport, Woken,
};
use bhatti_qemu::{PROGRAM, Qemu, QemuEngine};
use bhatti_testkit::{LIMIT, dist, images};
use bhatti_types::{CpuCount, MemoryMib, SandboxId};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// A VM without a daemon, used by one test.
struct Guest {
    engine: QemuEngine,
    id: SandboxId,
    directory: tempfile::TempDir,
    vm: Arc<dyn Vm>,
    client: AgentClient,
    _leftover: Leftover,
}

/// Kills the VM of a test that failed.
struct Leftover(PathBuf, SandboxId);

impl Drop for Leftover {
    fn drop(&mut self) {
        bhatti_testkit::kill_vmm(&self.0, &self.1.to_string());
    }
}

impl Guest {
    async fn boot() -> Self {
        Self::boot_in(tempfile::tempdir().unwrap(), false).await
    }

    /// Boots a guest. With `keep_disk`, boots it from the disk of a killed VM.
    async fn boot_in(directory: tempfile::TempDir, keep_disk: bool) -> Self {
        let files = ImageStore::new(images().parent().unwrap())
            .boot_files(DEFAULT_IMAGE, &dist("lohar"))
            .unwrap();
        let entropy = std::process::id().to_be_bytes();
        let id =
            SandboxId::from_entropy([0, 0, 0, 0, entropy[0], entropy[1], entropy[2], entropy[3]]);
        let spec = VmSpec {
            id,
            hostname: "guest".parse().unwrap(),
            cpus: CpuCount::ONE,
            memory: MemoryMib::try_from(256).unwrap(),
            disk: None,
            directory: directory.path().join("vm"),
            kernel: files.kernel,
            initramfs: files.initramfs,
            root_base: (!keep_disk).then_some(files.root),
            tap: None,
            volumes: Vec::new(),
            awaits_root: false,
            is_builder: false,
            boot_limit: LIMIT,
        };
        let engine = Qemu::engine(PROGRAM.into());
        let vm = engine.boot(&spec).await.unwrap();
        let client = AgentClient::new(vm.channel());
        let _leftover = Leftover(spec.directory, id);
        Self { engine, id, directory, vm, client, _leftover }
    }

    async fn run(&self, request: ExecRequest) -> Result<(i32, String, String), CallError> {
        let (code, stdout, stderr) = timeout(LIMIT, self.client.run(request)).await.unwrap()?;
        Ok((code, String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap()))
    }

    /// Runs a script as `user` and returns its output.
    async fn say(&self, user: Option<&str>, script: &str) -> String {
        let request = ExecRequest { user: user.map(str::to_owned), ..shell(script) };
        let (code, stdout, stderr) = self.run(request).await.unwrap();
        assert_eq!(code, 0, "{script}: {stderr}");
        stdout
    }

    async fn remove(&self) {
        self.engine.remove(self.id, &self.directory.path().join("vm")).await.unwrap();
    }
}

fn shell(script: &str) -> ExecRequest {
    ExecRequest { argv: ["sh", "-c", script].map(str::to_owned).to_vec(), ..ExecRequest::default() }
}

/// Returns a volume in memory: mounting does not depend on the kind of the device.
fn volume(mount: &str, read_only: bool) -> ConfigVolume {
    ConfigVolume { device: "volume".into(), mount: mount.into(), fs: "tmpfs".into(), read_only }
}

#[tokio::test]
async fn processes_run_as_the_user_and_configuration_is_private() {
    let mut guest = Guest::boot().await;
    let file = ConfigFile { content: "c2VjcmV0IGtleQ==".into(), mode: "0600".into() };
    let config = GuestConfig {
        sandbox_id: guest.id.to_string(),
        hostname: "renamed".into(),
        token: "CANARY-token".into(),
        env: [("GREETING".to_owned(), "hello".to_owned())].into(),
        files: [("/home/user/.key".to_owned(), file)].into(),
        dns: vec!["192.0.2.53".into()],
        volumes: vec![volume("/data", false), volume("/data/fixed", true)],
        init: "echo init as $(id -un) in $PWD; sleep 1000".into(),
        ..GuestConfig::default()
    };
    guest.client.configure(&config).await.unwrap();
    guest.client = guest.client.with_token(b"CANARY-token");

    let facts = guest
        .say(None, "id -un; echo $HOME $USER $GREETING; pwd; id -Gn; sudo -n id -u; hostname")
        .await;
    assert_eq!(facts, "user\n/home/user user hello\n/workspace\nuser\n0\nrenamed\n");
    assert_eq!(guest.say(Some("root"), "id -u; echo $HOME").await, "0\n/root\n");
    let facts = guest
        .say(
            None,
            "stat -c '%U %a' ~/.key; cat ~/.key; grep renamed /etc/hosts; cat /etc/resolv.conf",
        )
        .await;
    assert_eq!(facts, "user 600\nsecret key127.0.0.1 localhost renamed\nnameserver 192.0.2.53\n");
    let mounts =
        "stat -c '%U %n' /data; touch /data/x; grep -c ' /data/fixed tmpfs ro,' /proc/mounts";
    assert_eq!(guest.say(None, mounts).await, "user /data\n1\n");
    guest.client.write_file("/workspace/new/file", "0666", 1, &b"x"[..]).await.unwrap();
    assert_eq!(guest.say(None, "stat -c '%U %a' /workspace/new/file").await, "user 666\n");
    let (_, _input, mut output) = guest.client.attach("init", None).await.unwrap();
    let event = timeout(LIMIT, output.next()).await.unwrap().unwrap();
    assert!(format!("{event:?}").contains("init as user in /workspace"), "{event:?}");

    // The token is in no file and in no process's environment; only the agent's memory holds it.
    let search = "grep -rsl CANARY / --exclude-dir=proc --exclude-dir=sys; grep -l CANARY /proc/[0-9]*/environ 2>/dev/null; true";
    assert_eq!(guest.say(Some("root"), search).await, "");
    guest.remove().await;
}

#[tokio::test]
async fn agent_survives_memory_exhaustion_and_a_fork_bomb() {
    let guest = Guest::boot().await;
    let mut events = guest.client.events().await.unwrap();

    let places = "cat /proc/self/oom_score_adj /proc/self/cgroup /proc/1/cgroup";
    assert_eq!(guest.say(None, places).await, "0\n0::/user\n0::/\n");
    let hog = "import time\nx=[]\nwhile True: x.append(bytearray(1<<20))";
    let python = ExecRequest {
        argv: ["python3", "-c", hog].map(str::to_owned).to_vec(),
        ..ExecRequest::default()
    };
    assert_eq!(guest.run(python).await.unwrap().0, 137);
    let GuestEvent::OomKill { name, .. } = timeout(LIMIT, events.next()).await.unwrap().unwrap();
    assert_eq!(name, "python3");

    let bomb = ExecRequest {
        timeout_ms: Some(3000),
        ..shell("bomb() { bomb | bomb & }; bomb; sleep 1000")
    };
    assert!(guest.run(bomb).await.is_ok());
    // The bomb's processes keep running. The agent still serves, and can kill them.
    assert!(guest.client.list_directory("/").await.unwrap().len() > 5);
    let kill = "echo 1 > /sys/fs/cgroup/user/cgroup.kill";
    let killed = ExecRequest { user: Some("root".into()), ..shell(kill) };
    drop(timeout(Duration::from_secs(30), guest.client.run(killed)).await);
    guest.client.wait_ready(LIMIT).await.unwrap();
    guest.remove().await;
}

/// The addresses of the only interface of a guest without a network card.
const ADDRESSES: &str = "ip -4 -o address show dev lo | awk '{print $4}'";

fn network(address: &str) -> GuestNetwork {
    GuestNetwork { interface: "lo".into(), address: address.into(), ..GuestNetwork::default() }
}

#[tokio::test]
async fn guest_assumes_an_identity_and_shuts_down_in_order() {
    let guest = Guest::boot().await;
    let before = guest.say(None, "cat /etc/machine-id").await;
    let parent = GuestConfig { network: Some(network("10.9.8.7/24")), ..GuestConfig::default() };
    guest.client.configure(&parent).await.unwrap();
    assert_eq!(guest.say(None, ADDRESSES).await, "10.9.8.7/24\n");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let later = now + Duration::from_secs(5 * 24 * 3600);
    let identity = Identity {
        entropy: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=".into(),
        wall_clock_ns: u64::try_from(later.as_nanos()).unwrap(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        config: GuestConfig {
            hostname: "fork".into(),
            network: Some(network("10.9.8.8/24")),
            ..GuestConfig::default()
        },
        rehearsal: false,
    };

    let mut report = guest.client.assume_identity(&identity).await.unwrap();

    let about_then = later.as_secs()..later.as_secs() + 60;
    let shown = Duration::from_nanos(report.clock_ns.take().unwrap());
    assert!(about_then.contains(&shown.as_secs()), "{shown:?}");
    let done = || Applied::Done;
    let expected = IdentityReport {
        rng: done(),
        wall_clock: done(),
        hostname: done(),
        machine_id: done(),
        token: done(),
        environment: done(),
        files: Applied::Nothing,
        addresses: done(),
        first_setup: Applied::Nothing,
        connections: Applied::Nothing,
        clock_ns: None,
    };
    assert_eq!(report, expected);
    assert_eq!(guest.say(None, ADDRESSES).await, "10.9.8.8/24\n");
    let facts = guest.say(None, "hostname; cat /etc/machine-id; date +%s").await;
    let facts: Vec<&str> = facts.lines().collect();
    assert_eq!(facts[..2], ["fork", "0123456789abcdef0123456789abcdef"]);
    assert_ne!(facts[1], before.trim());
    let clock: u64 = facts[2].parse().unwrap();
    assert!(about_then.contains(&clock), "{clock}");

    let script = "trap 'echo asked to end >/dev/console; exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let stubborn = "trap '' TERM; while :; do sleep 0.1; done";
    let as_root = |script: &str| ExecRequest { user: Some("root".into()), ..shell(script) };
    let (_, _input, mut output) = guest.client.create_session(as_root(script)).await.unwrap();
    timeout(LIMIT, output.next()).await.unwrap().unwrap();
    guest.client.create_detached(as_root(stubborn)).await.unwrap();
    let on_quit = "trap 'echo asked to quit >/dev/console; exit 0' QUIT; \
                   trap 'echo too early >/dev/console' TERM; \
                   echo ready; while :; do sleep 0.1; done";
    let own = ExecRequest { stop_signal: Some(3), ..as_root(on_quit) };
    let (_, _input, mut output) = guest.client.create_session(own).await.unwrap();
    timeout(LIMIT, output.next()).await.unwrap().unwrap();
    guest.client.shut_down().await.unwrap();
    timeout(LIMIT, guest.vm.ended()).await.unwrap();
    let asked = || {
        let console = guest.vm.console_tail();
        console.contains("asked to end") && console.contains("asked to quit")
    };
    bhatti_testkit::wait_for("the processes' output on SIGTERM and SIGQUIT", asked).await;
    assert!(!guest.vm.console_tail().contains("too early"));
    guest.remove().await;
}

#[tokio::test]
async fn suspended_guest_runs_no_process_until_it_gets_an_identity_or_wakes() {
    let guest = Guest::boot().await;
    let ticking = "while :; do echo x >>/dev/shm/ticks; sleep 0.01; done";
    guest.client.create_detached(shell(ticking)).await.unwrap();
    let ticks = async || guest.client.stat("/dev/shm/ticks").await.map_or(0, |file| file.size);
    let goes_on = async || {
        let before = ticks().await;
        let more = async { while ticks().await <= before {} };
        timeout(LIMIT, more).await.expect("the process runs again");
    };
    goes_on().await;

    guest.client.suspend(true).await.unwrap();
    guest.client.suspend(false).await.unwrap();
    let before = ticks().await;
    // A command from the host starts in the users' cgroup, and is suspended with it.
    let (_input, mut output) = guest.client.exec(shell("echo started")).await.unwrap();
    timeout(Duration::from_millis(200), output.next()).await.expect_err("the command is suspended");
    assert_eq!(ticks().await, before);

    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let wall_clock_ns = u64::try_from(now.as_nanos()).unwrap();
    let woken = Woken { entropy: "AAECAwQFBgc=".into(), wall_clock_ns };
    guest.client.woken(&woken).await.unwrap();
    let event = timeout(LIMIT, output.next()).await.unwrap().unwrap();
    assert_eq!(event, ExecEvent::Stdout("started\n".into()));
    goes_on().await;

    // A guest that was never configured, as in a base snapshot: its identity includes a complete
    // configuration.
    guest.client.suspend(false).await.unwrap();
    let config = GuestConfig {
        hostname: "fork".into(),
        init: "hostname; sleep 1000".into(),
        dns: vec!["192.0.2.53".into()],
        ..GuestConfig::default()
    };
    let identity = Identity {
        entropy: "AAECAwQFBgc=".into(),
        wall_clock_ns,
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        config,
        rehearsal: true,
    };
    let report = guest.client.assume_identity(&identity).await.unwrap();
    assert_eq!(report.first_setup, Applied::Nothing);
    goes_on().await;
    let identity = Identity { rehearsal: false, ..identity };
    let report = guest.client.assume_identity(&identity).await.unwrap();
    assert_eq!(report.first_setup, Applied::Done);
    let (_, _input, mut output) = guest.client.attach("init", None).await.unwrap();
    let event = timeout(LIMIT, output.next()).await.unwrap().unwrap();
    assert!(format!("{event:?}").contains("fork"), "{event:?}");
    assert_eq!(guest.say(None, "cat /etc/resolv.conf").await, "nameserver 192.0.2.53\n");
    goes_on().await;
    guest.remove().await;
}

async fn freeze(vm: &dyn Vm, snapshot: &Path) {
    vm.pause().await.unwrap();
    let request = SnapshotRequest {
        directory: snapshot.to_owned(),
        memory: None,
        disks: Disks::Frozen,
        copies: Vec::new(),
    };
    vm.capture(&request).await.unwrap().finish().await.unwrap();
    vm.resume().await.unwrap();
}

/// A second client of QEMU's monitor, which serves one client at a time: the engine must have
/// disconnected.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    async fn connect(directory: &Path) -> Self {
        let monitor = UnixStream::connect(directory.join("qmp.sock")).await.unwrap();
        let mut monitor = Self(BufReader::new(monitor));
        monitor.ask("qmp_capabilities", json!({})).await;
        monitor
    }

    async fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.try_to(command, arguments).await.unwrap()
    }

    /// Sends a command. Returns QEMU's result, or its error.
    async fn try_to(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.0.write_all(request.to_string().as_bytes()).await.unwrap();
        loop {
            let mut line = String::new();
            timeout(LIMIT, self.0.read_line(&mut line)).await.unwrap().unwrap();
            let mut event: Value = serde_json::from_str(&line).unwrap();
            if let Some(answer) = event.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(why) = event["error"]["desc"].as_str() {
                return Err(why.to_owned());
            }
        }
    }

    /// Starts a job that copies the layers of the disk, at `speed` bytes per second.
    async fn copy(&mut self, speed: u64) {
        let arguments = json!({
            "job-id": "left", "device": "root", "speed": speed, "auto-finalize": false, "auto-dismiss": false,
        });
        self.ask("block-stream", arguments).await;
    }
}

const READ: &str = "echo 3 >/proc/sys/vm/drop_caches; sha256sum /workspace/file";

/// Boots a guest with a file in a layer below the topmost one. Returns the file's checksum, too.
async fn with_layers(snapshots: &Path) -> (Guest, String) {
    let guest = Guest::boot().await;
    let write = "head -c 9000000 /dev/urandom >/workspace/file; sync; sha256sum /workspace/file";
    let sum = guest.say(None, write).await;
    freeze(&*guest.vm, &snapshots.join("first")).await;
    (guest, sum)
}

#[tokio::test]
async fn disk_with_an_unfinished_merge_is_saved_completely() {
    let snapshots = tempfile::tempdir().unwrap();
    let (guest, sum) = with_layers(snapshots.path()).await;
    let Guest { engine, id, directory, vm, client, _leftover } = guest;
    drop((vm, client));
    // One byte per second: the job does not end by itself.
    let place = directory.path().join("vm");
    Monitor::connect(&place).await.copy(1).await;

    let vm = engine.adopt(id, &place).await.unwrap();
    let client = AgentClient::new(vm.channel());
    let guest = Guest { engine, id, directory, vm, client, _leftover };
    freeze(&*guest.vm, &snapshots.path().join("second")).await;

    assert_eq!(guest.say(Some("root"), READ).await, sum);
    guest.remove().await;
}

#[tokio::test]
async fn disk_is_intact_after_qemu_dies_at_any_point_of_a_merge() {
    let snapshots = tempfile::tempdir().unwrap();
    let (mut guest, sum) = with_layers(snapshots.path()).await;
    for (speed, copied) in [(1, 1), (4 << 20, 4 << 20), (0, u64::MAX)] {
        guest.say(None, &format!("echo {speed} >>/workspace/rounds; sync")).await;
        let Guest { engine, id, directory, vm, client, _leftover: leftover } = guest;
        drop((vm, client));
        let place = directory.path().join("vm");
        let mut monitor = Monitor::connect(&place).await;
        monitor.copy(speed).await;
        let copied_so_far = async {
            loop {
                let job = monitor.ask("query-jobs", json!({})).await[0].take();
                assert_ne!(job["status"], "concluded", "{job}");
                if job["status"] == "pending" || job["current-progress"].as_u64() >= Some(copied) {
                    break;
                }
            }
        };
        timeout(LIMIT, copied_so_far).await.unwrap();

        drop(leftover);
        engine.kill(id, &place).await.unwrap();
        guest = Guest::boot_in(directory, true).await;

        assert_eq!(guest.say(Some("root"), READ).await, sum, "{speed} bytes per second");
    }
    assert_eq!(guest.say(None, "cat /workspace/rounds").await, "1\n4194304\n0\n");
    guest.remove().await;
}

/// The capability `CAP_DAC_READ_SEARCH`.
const TO_READ: u64 = 1 << 2;

/// Sends commands that a compromised QEMU would execute after an escape from its guest.
#[tokio::test]
async fn vmm_accesses_only_its_own_files() {
    if landlock_version() == 0 {
        bhatti_testkit::skip("vmm_accesses_only_its_own_files", "this kernel has no Landlock");
        return;
    }
    let guest = Guest::boot().await;
    let (own, others) = (guest.directory.path().join("vm"), tempfile::tempdir().unwrap());
    let mut monitor = Monitor::connect(&own).await;
    let mut refused = async |command: &str, arguments: Value| {
        monitor.try_to(command, arguments).await.err().unwrap_or_default()
    };

    let pid = bhatti_testkit::vmm_pid_of(&own, &guest.id.to_string()).unwrap();
    let user = owner_of(pid);
    for place in [&own, others.path()] {
        fs::write(place.join("disk"), [0; 4096]).unwrap();
        fs::write(place.join("state"), "").unwrap();
        chown(place.join("state"), Some(user), None).unwrap();
    }
    let open = |place: &Path, name: &str| {
        let file = json!({ "driver": "file", "filename": place.join("disk"), "read-only": true });
        json!({ "driver": "raw", "node-name": name, "read-only": true, "file": file })
    };
    let save = |place: &Path| json!({ "filename": place.join("state") });
    let listener = std::os::unix::net::UnixListener::bind(others.path().join("socket")).unwrap();
    let address = listener.local_addr().unwrap();
    let address = json!({ "path": address.as_pathname().unwrap() });
    let backend = json!({ "addr": { "type": "unix", "data": address }, "server": false });
    let connect = json!({ "id": "out", "backend": { "type": "socket", "data": backend } });

    assert_eq!(refused("blockdev-add", open(&own, "own")).await, "");
    assert!(refused("blockdev-add", open(others.path(), "other")).await.contains("denied"));
    assert!(refused("chardev-add", connect).await.contains("not permitted"));
    assert!(refused("xen-save-devices-state", save(others.path())).await.contains("denied"));
    assert_eq!(fs::read(others.path().join("state")).unwrap(), b"");
    assert_eq!(refused("xen-save-devices-state", save(&own)).await, "");

    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let says = |field: &str| status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    let capabilities = u64::from_str_radix(says("CapPrm:").trim(), 16).unwrap();
    assert_eq!(capabilities & !TO_READ, 0, "{capabilities:x}");
    assert_eq!(says("NoNewPrivs:").trim(), "1");
    guest.remove().await;
}

/// Whether a process can be moved to a control group on this host.
async fn can_use_groups(groups: bhatti_vmm::cgroup::Groups) -> bool {
    let mut probe = bhatti_host::process::command("sleep").arg("60").spawn().unwrap();
    let entered = bhatti_vmm::cgroup::enter(groups, "bhatti-probe", 64, probe.id().unwrap());
    probe.kill().await.unwrap();
    bhatti_vmm::cgroup::remove("bhatti-probe").await.unwrap();
    entered.is_ok() && groups != bhatti_vmm::cgroup::Groups::Unusable
}

/// Returns the user that a process runs as.
fn owner_of(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
    users.split_whitespace().next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn vmm_of_a_root_daemon_has_its_own_user_and_control_group() {
    let what = "vmm_of_a_root_daemon_has_its_own_user_and_control_group";
    if !bhatti_host::process::can_use_users() {
        bhatti_testkit::skip(what, "only root can run a process as another user");
        return;
    }
    let guest = Guest::boot().await;
    let directory = guest.directory.path().join("vm");
    let pid = bhatti_testkit::vmm_pid_of(&directory, &guest.id.to_string()).unwrap();
    assert_eq!(owner_of(pid), bhatti_vmm::user_of(guest.id));
    let groups = bhatti_vmm::cgroup::Groups::of_host();
    if !can_use_groups(groups).await {
        bhatti_testkit::skip(what, "no usable control groups");
    } else {
        let inside = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let name = format!("/bhatti/bhatti-{}", guest.id);
        assert!(inside.lines().any(|line| line.ends_with(&name)), "{inside}");
    }
    // The disk is frozen and saved correctly for that user, too.
    let snapshots = tempfile::tempdir().unwrap();
    freeze(&*guest.vm, &snapshots.path().join("first")).await;
    assert_eq!(
        guest.say(None, "echo written >/workspace/f; sync; cat /workspace/f").await,
        "written\n"
    );
    let group = guest.id;
    guest.remove().await;
    for tree in ["memory", "pids", "."] {
        let left = Path::new("/sys/fs/cgroup").join(tree).join(format!("bhatti/bhatti-{group}"));
        assert!(!left.exists(), "{}", left.display());
    }
}
