//! The agent as PID 1 of a real guest.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_agent::{AgentClient, CallError, ExecEvent};
use bhatti_engine::{Engine, Vm, VmSpec};
use bhatti_image::{DEFAULT_IMAGE, ImageStore};
use bhatti_proto::{
    Applied, ConfigFile, ConfigVolume, ExecRequest, GuestConfig, GuestEvent, GuestNetwork,
    Identity, IdentityReport, Woken,
};
use bhatti_qemu::{PROGRAM, QemuEngine};
use bhatti_testkit::{LIMIT, dist, images};
use bhatti_types::{CpuCount, MemoryMib, SandboxId};
use tokio::time::timeout;

/// A VM of a test's own, without a daemon.
struct Guest {
    engine: QemuEngine,
    id: SandboxId,
    directory: tempfile::TempDir,
    vm: Arc<dyn Vm>,
    client: AgentClient,
}

impl Guest {
    async fn boot() -> Self {
        let directory = tempfile::tempdir().unwrap();
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
            directory: directory.path().join("vm"),
            kernel: files.kernel,
            initramfs: files.initramfs,
            root_base: files.root,
            keep_disk: false,
            tap: None,
            volumes: Vec::new(),
            boot_limit: LIMIT,
        };
        let engine = QemuEngine::new(PROGRAM.into());
        let vm = engine.boot(&spec).await.unwrap();
        let client = AgentClient::new(vm.channel());
        Self { engine, id, directory, vm, client }
    }

    async fn run(&self, request: ExecRequest) -> Result<(i32, String, String), CallError> {
        let (code, stdout, stderr) = timeout(LIMIT, self.client.run(request)).await.unwrap()?;
        Ok((code, String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap()))
    }

    /// What a script says, as `user`.
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

impl Drop for Guest {
    /// A test that failed leaves no VM behind either.
    fn drop(&mut self) {
        bhatti_testkit::kill_vmm(&self.directory.path().join("vm"), &self.id.to_string());
    }
}

fn shell(script: &str) -> ExecRequest {
    ExecRequest { argv: ["sh", "-c", script].map(str::to_owned).to_vec(), ..ExecRequest::default() }
}

/// A volume in memory: what its device is makes no difference to how it is mounted.
fn volume(mount: &str, read_only: bool) -> ConfigVolume {
    ConfigVolume { device: "volume".into(), mount: mount.into(), fs: "tmpfs".into(), read_only }
}

#[tokio::test]
async fn processes_are_the_users_and_the_configuration_is_theirs_alone() {
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
    let said = timeout(LIMIT, output.next()).await.unwrap().unwrap();
    assert!(format!("{said:?}").contains("init as user in /workspace"), "{said:?}");

    // The token is in no file, and in no environment but the agent's memory.
    let search = "grep -rsl CANARY / --exclude-dir=proc --exclude-dir=sys; grep -l CANARY /proc/[0-9]*/environ 2>/dev/null; true";
    assert_eq!(guest.say(Some("root"), search).await, "");
    guest.remove().await;
}

#[tokio::test]
async fn nothing_that_users_do_to_memory_or_processes_reaches_the_agent() {
    let guest = Guest::boot().await;
    let mut events = guest.client.events().await.unwrap();

    let scores =
        "cat /proc/1/oom_score_adj /proc/self/oom_score_adj /proc/self/cgroup /proc/1/cgroup";
    assert_eq!(guest.say(None, scores).await, "-1000\n0\n0::/user\n0::/\n");
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
    // The bomb's processes go on; the agent serves all the same, and can clear them away.
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
async fn guest_takes_another_identity_and_shuts_down_in_order() {
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

    let report = guest.client.assume_identity(&identity).await.unwrap();

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
    };
    assert_eq!(report, expected);
    assert_eq!(guest.say(None, ADDRESSES).await, "10.9.8.8/24\n");
    let facts = guest.say(None, "hostname; cat /etc/machine-id; date +%s").await;
    let facts: Vec<&str> = facts.lines().collect();
    assert_eq!(facts[..2], ["fork", "0123456789abcdef0123456789abcdef"]);
    assert_ne!(facts[1], before.trim());
    let clock: u64 = facts[2].parse().unwrap();
    assert!((later.as_secs()..later.as_secs() + 60).contains(&clock), "{clock}");

    let script = "trap 'echo asked to end >/dev/console; exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let stubborn = "trap '' TERM; while :; do sleep 0.1; done";
    let as_root = |script: &str| ExecRequest { user: Some("root".into()), ..shell(script) };
    let (_, _input, mut output) = guest.client.create_session(as_root(script)).await.unwrap();
    timeout(LIMIT, output.next()).await.unwrap().unwrap();
    guest.client.create_detached(as_root(stubborn)).await.unwrap();
    guest.client.shut_down().await.unwrap();
    timeout(LIMIT, guest.vm.ended()).await.unwrap();
    let asked = || guest.vm.console_tail().contains("asked to end");
    bhatti_testkit::wait_for("the process's last words", asked).await;
    guest.remove().await;
}

#[tokio::test]
async fn suspended_guest_stands_still_until_it_has_another_identity_or_is_woken() {
    let guest = Guest::boot().await;
    let ticking = "while :; do echo x >>/dev/shm/ticks; sleep 0.01; done";
    guest.client.create_detached(shell(ticking)).await.unwrap();
    let ticks = async || guest.client.stat("/dev/shm/ticks").await.map_or(0, |file| file.size);
    let goes_on = async || {
        let before = ticks().await;
        let more = async { while ticks().await <= before {} };
        timeout(LIMIT, more).await.expect("the process goes on");
    };
    goes_on().await;

    guest.client.suspend(true).await.unwrap();
    guest.client.suspend(false).await.unwrap();
    let before = ticks().await;
    // A command of the host's starts among the users', and stands still with them.
    let (_input, mut output) = guest.client.exec(shell("echo started")).await.unwrap();
    timeout(Duration::from_millis(200), output.next()).await.expect_err("nothing runs");
    assert_eq!(ticks().await, before);

    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let wall_clock_ns = u64::try_from(now.as_nanos()).unwrap();
    let woken = Woken { entropy: "AAECAwQFBgc=".into(), wall_clock_ns };
    guest.client.woken(&woken).await.unwrap();
    let said = timeout(LIMIT, output.next()).await.unwrap().unwrap();
    assert_eq!(said, ExecEvent::Stdout("started\n".into()));
    goes_on().await;

    // A guest that was never configured, as a template's is: the identity brings all of a configuration.
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
    let said = timeout(LIMIT, output.next()).await.unwrap().unwrap();
    assert!(format!("{said:?}").contains("fork"), "{said:?}");
    assert_eq!(guest.say(None, "cat /etc/resolv.conf").await, "nameserver 192.0.2.53\n");
    goes_on().await;
    guest.remove().await;
}
