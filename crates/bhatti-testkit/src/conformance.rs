//! Runs `bhatti_engine::conformance` on an engine, with guests of the tests' image.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::fs;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bhatti_agent::AgentClient;
use bhatti_engine::conformance::{Bench, Shell, random_id};
use bhatti_engine::{Engine, Vm, VmSpec};
use bhatti_image::{DEFAULT_IMAGE, ImageStore};
use bhatti_proto::{Applied, ConfigVolume, ExecRequest, GuestConfig, Identity, Woken};
use bhatti_types::{CpuCount, MemoryMib};
use futures_util::FutureExt;
use tokio::time::{Instant, timeout};

use crate::{LIMIT, dist, images};

/// The longest round trip of a message whose wall clock is still exact enough.
const EXACT: Duration = Duration::from_millis(20);

/// Defines the tests that every engine must pass. The expression returns the engine, or `None` if
/// the engine cannot run here; in that case it has reported the skip.
#[macro_export]
macro_rules! conformance_tests {
    ($engine:expr) => {
        $crate::conformance_tests! { $engine;
            vm_is_booted_adopted_killed_and_removed: lifecycle,
            vm_pause_and_resume_are_idempotent: thermal,
            full_snapshot_and_three_diffs_keep_the_data_of_every_phase: snapshot_cycles,
            forks_share_only_their_base: fork,
            restored_guests_get_their_identity_before_processes_resume: identity,
            damaged_and_stale_snapshots_are_refused_and_change_nothing: failure,
            disk_outlives_its_vm: keep_disk,
            volumes_are_mounted_and_outlive_their_vm: volumes,
        }
    };
    ($engine:expr; $($fact:ident: $part:ident,)*) => {
        $(
            #[tokio::test]
            async fn $fact() {
                if let Some(engine) = $engine {
                    $crate::conformance::on_trial(
                        &engine,
                        bhatti_engine::conformance::$part,
                    )
                    .await;
                }
            }
        )*
    };
}

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

    async fn configure(&self, vm: &dyn Vm, volumes: &[(&str, bool)]) {
        let volume = |(place, (mount, read_only)): (usize, &(&str, bool))| ConfigVolume {
            device: format!("/dev/disk/by-id/virtio-volume{place}"),
            mount: (*mount).to_owned(),
            fs: "ext4".to_owned(),
            read_only: *read_only,
        };
        let config = GuestConfig {
            hostname: "trial".to_owned(),
            volumes: volumes.iter().enumerate().map(volume).collect(),
            ..GuestConfig::default()
        };
        AgentClient::new(vm.channel()).configure(&config).await.unwrap();
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
        // A slow message sets the guest's clock late. Once the guest's code is translated, messages
        // are fast.
        for _ in 0..20 {
            let began = Instant::now();
            self.wake(vm).await;
            if began.elapsed() < EXACT {
                break;
            }
        }
    }
}

/// Returns 32 bytes that no other guest gets, in base64.
fn entropy() -> String {
    let id = tempfile::NamedTempFile::new().unwrap();
    let name = id.path().file_name().unwrap().to_string_lossy().replace('.', "a");
    format!("{name:a>43}=")[..44].to_owned()
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(since.as_nanos()).unwrap()
}

/// Runs a part of the suite in its own directory.
///
/// # Panics
///
/// Panics if the engine fails the part.
pub async fn on_trial(engine: &dyn Engine, part: impl AsyncFnOnce(&Bench<'_>)) {
    let directory = tempfile::tempdir().unwrap();
    let files = ImageStore::new(images().parent().unwrap())
        .boot_files(DEFAULT_IMAGE, &dist("lohar"))
        .unwrap();
    let id = random_id();
    let spec = VmSpec {
        id,
        hostname: "trial".parse().unwrap(),
        cpus: CpuCount::ONE,
        memory: MemoryMib::try_from(256).unwrap(),
        disk: None,
        directory: directory.path().join(id.to_string()),
        kernel: files.kernel,
        initramfs: files.initramfs,
        root_base: Some(files.root),
        tap: None,
        volumes: Vec::new(),
        awaits_root: false,
        is_builder: false,
        boot_limit: LIMIT,
    };
    let bench = Bench { engine, shell: &AgentShell, spec };
    let passed = AssertUnwindSafe(part(&bench)).catch_unwind().await;
    // Removes the VMs that a failed part has left.
    for entry in fs::read_dir(directory.path()).unwrap().flatten() {
        if let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            engine.remove(id, &entry.path()).await.unwrap();
        }
    }
    if let Err(panic) = passed {
        resume_unwind(panic);
    }
}
