//! The engine as `bhatti_engine::conformance` wants it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bhatti_agent::AgentClient;
use bhatti_engine::conformance::{self, Bench, Shell};
use bhatti_engine::{Vm, VmSpec};
use bhatti_image::{DEFAULT_IMAGE, ImageStore};
use bhatti_proto::{Applied, ExecRequest, GuestConfig, Identity, Woken};
use bhatti_qemu::{PROGRAM, QemuEngine};
use bhatti_testkit::{LIMIT, dist, images};
use bhatti_types::{CpuCount, MemoryMib, SandboxId};
use tokio::time::{Instant, timeout};

struct AgentShell;

#[async_trait]
impl Shell for AgentShell {
    async fn run(&self, vm: &dyn Vm, script: &str) -> String {
        let request = ExecRequest {
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            user: Some("root".into()),
            ..ExecRequest::default()
        };
        let client = AgentClient::new(vm.channel());
        let (code, stdout, stderr) = timeout(LIMIT, client.run(request)).await.unwrap().unwrap();
        assert_eq!(code, 0, "{script}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap().trim_end_matches('\n').to_owned()
    }

    async fn suspend(&self, vm: &dyn Vm) {
        AgentClient::new(vm.channel()).suspend(true).await.unwrap();
    }

    async fn wake(&self, vm: &dyn Vm) {
        let woken = Woken { entropy: entropy(), wall_clock_ns: now_ns() };
        AgentClient::new(vm.channel()).woken(&woken).await.unwrap();
    }

    async fn become_another(&self, vm: &dyn Vm, name: &str) {
        let client = AgentClient::new(vm.channel());
        client.reach().await.unwrap();
        let identity = Identity {
            entropy: entropy(),
            wall_clock_ns: now_ns(),
            machine_id: if name == "one" { "1" } else { "2" }.repeat(32),
            config: GuestConfig { hostname: name.to_owned(), ..GuestConfig::default() },
            rehearsal: false,
        };
        let report = client.assume_identity(&identity).await.unwrap();
        assert_eq!(report.hostname, Applied::Done, "{report:?}");
        // What takes long makes the clock late. Translated once, it does not.
        for _ in 0..20 {
            let began = Instant::now();
            self.wake(vm).await;
            if began.elapsed() < EXACT {
                break;
            }
        }
    }
}

/// How long a message may take whose clock is to be exact.
const EXACT: Duration = Duration::from_millis(20);

/// 32 bytes that no other guest is fed, in base64.
fn entropy() -> String {
    let id = tempfile::NamedTempFile::new().unwrap();
    let name = id.path().file_name().unwrap().to_string_lossy().replace('.', "a");
    format!("{name:a>43}=")[..44].to_owned()
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(since.as_nanos()).unwrap()
}

/// Runs a part of the suite in a directory of its own.
async fn on_trial(part: impl AsyncFnOnce(&Bench<'_>)) {
    let directory = tempfile::tempdir().unwrap();
    let files = ImageStore::new(images().parent().unwrap())
        .boot_files(DEFAULT_IMAGE, &dist("lohar"))
        .unwrap();
    let process = std::process::id().to_be_bytes();
    let id = SandboxId::from_entropy([process[0], process[1], process[2], process[3], 0, 0, 0, 0]);
    let spec = VmSpec {
        id,
        hostname: "trial".parse().unwrap(),
        cpus: CpuCount::ONE,
        memory: MemoryMib::try_from(256).unwrap(),
        directory: directory.path().join(id.to_string()),
        kernel: files.kernel,
        initramfs: files.initramfs,
        root_base: files.root,
        keep_disk: false,
        tap: None,
        volumes: Vec::new(),
        boot_limit: LIMIT,
    };
    let _killer = Killer(directory.path().to_owned());
    part(&Bench { engine: &QemuEngine::new(PROGRAM.into()), shell: &AgentShell, spec }).await;
}

/// Ends whatever VMs a test that failed has left.
struct Killer(std::path::PathBuf);

impl Drop for Killer {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(&self.0).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            bhatti_testkit::kill_vmm(&entry.path(), &name);
        }
    }
}

#[tokio::test]
async fn vm_is_booted_taken_up_killed_and_removed() {
    on_trial(conformance::lifecycle).await;
}

#[tokio::test]
async fn vm_pauses_and_resumes_however_often_it_is_told() {
    on_trial(conformance::thermal).await;
}

#[tokio::test]
async fn full_snapshot_and_three_diffs_keep_the_data_of_every_phase() {
    on_trial(conformance::snapshot_cycles).await;
}

#[tokio::test]
async fn forks_share_what_they_stand_on_and_nothing_else() {
    on_trial(conformance::fork).await;
}

#[tokio::test]
async fn restored_guests_are_others_before_their_processes_go_on() {
    on_trial(conformance::identity).await;
}

#[tokio::test]
async fn damaged_and_stale_snapshots_are_refused_and_change_nothing() {
    on_trial(conformance::failure).await;
}
