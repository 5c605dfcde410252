//! The costs of forks, snapshots, pauses and wakes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bhatti_agent::AgentClient;
use bhatti_api::{CreateSandbox, CreateSnapshot, ForkSandbox, StartSandbox};
use bhatti_engine::conformance::random_id;
use bhatti_engine::{Disks, Engine, MemoryKind, RestoreSpec, SnapshotRequest, Vm};
use bhatti_qemu::{PROGRAM, Qemu, QemuEngine};
use bhatti_testkit::{Serve, TestDaemon, named, run, wait_for};
use bhatti_types::SandboxId;
use tokio::time::Instant;

use super::{ROUNDS, median, mib, show};

/// Samples of figures that take long to measure.
const FEW: usize = 50;

/// How long a spare VMM takes from the start of its process until it waits for a snapshot.
const VMM_WAITS: Duration = Duration::from_millis(100);
/// How long a spare VM takes from the start of its process until its warm-up run has ended.
pub(crate) const VM_PRACTISES: Duration = Duration::from_millis(1500);

const LIMIT: Duration = Duration::from_secs(60);

/// Measures and prints the section `forks`.
pub(super) async fn measure() -> Result<()> {
    let config = "ready_vmms: 0\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let origin = daemon.client.create(&named("first")).await?.origin;
    let template = origin.strip_prefix("template ").context("not forked from a base snapshot")?;
    let template = daemon.data_dir().join("templates").join(template).canonicalize()?;
    daemon.client.destroy("first").await?;

    let bare = bare_forks(&template).await?;
    for (what, config, wait) in [
        ("create with nothing ready, and first exec", "ready_vmms: 0\n", None),
        ("create with a VMM waiting, and first exec", "ready_forks: 0\n", Some(VMM_WAITS)),
        ("create without a network, and first exec", "network: off\n", Some(VM_PRACTISES)),
        ("create as by default, and first exec", "", Some(VM_PRACTISES)),
    ] {
        daemon.terminate().await;
        std::fs::write(daemon.data_dir().join("config.yaml"), config)?;
        daemon.serve().await;
        // The first create makes the base snapshot of this configuration.
        daemon.client.create(&named("first")).await?;
        daemon.client.destroy("first").await?;
        let times = creates(&daemon, wait).await?;
        ratio(what, &times, "a bare fork", bare);
        show(what, times);
    }
    sleeping(&mut daemon, bare).await?;
    forking(&daemon).await
}

fn ratio(what: &str, times: &[Duration], of: &str, base: Duration) {
    let times = median(&mut times.to_vec()).as_secs_f64();
    println!("{:44} {:>26.2} × {of}", format!("  {what}"), times / base.as_secs_f64());
}

/// Measures the engine alone: from a base snapshot to a VM whose agent answers, step by step.
async fn bare_forks(template: &Path) -> Result<Duration> {
    let engine = Qemu::engine(PROGRAM.into());
    let place = tempfile::tempdir()?;
    let mut parts: [Vec<Duration>; 4] = Default::default();
    let mut whole = Vec::new();
    for round in 0..FEW {
        let id = random_id();
        // Base snapshots have a network card if the host can have networks.
        let tap = bhatti_testkit::enter_own_network().then(|| bhatti_net::tap_name(id));
        let spec = bare_spec(id, template, place.path(), tap);
        let directory = spec.directory.clone();
        let began = Instant::now();
        let staged = engine.stage(&spec).await?;
        parts[0].push(began.elapsed());
        if round == 0 {
            println!(
                "{:44} {:>26.1} MiB",
                "a VMM that waits: Pss",
                rollup_mib(vmm(&directory)?, "Pss:")?
            );
        }
        let loading = Instant::now();
        let vm = staged.load().await?;
        parts[1].push(loading.elapsed());
        let resuming = Instant::now();
        vm.resume().await?;
        parts[2].push(resuming.elapsed());
        let answering = Instant::now();
        AgentClient::new(vm.channel()).activity().await?;
        parts[3].push(answering.elapsed());
        whole.push(began.elapsed());
        if round == 0 {
            memory(&directory).await?;
        }
        engine.remove(id, &directory).await?;
    }
    let names = ["process start to QMP", "state loaded", "vCPUs run", "agent answers"];
    for (name, times) in names.into_iter().zip(parts) {
        show(&format!("bare fork: {name}"), times);
    }
    let bare = median(&mut whole);
    show("bare fork: all of it", whole);
    Ok(bare)
}

/// Measures the engine alone, once: from a base snapshot to a VM whose agent answers.
pub(crate) async fn bare_fork(
    engine: &QemuEngine,
    template: &Path,
    place: &Path,
    tap: Option<String>,
) -> Result<Duration> {
    let id = random_id();
    let spec = bare_spec(id, template, place, tap);
    let began = Instant::now();
    let vm = engine.stage(&spec).await?.load().await?;
    vm.resume().await?;
    AgentClient::new(vm.channel()).activity().await?;
    let took = began.elapsed();
    engine.remove(id, &spec.directory).await?;
    Ok(took)
}

fn bare_spec(id: SandboxId, template: &Path, place: &Path, tap: Option<String>) -> RestoreSpec {
    RestoreSpec {
        id,
        directory: place.join(id.to_string()),
        snapshot: template.to_owned(),
        disks: Disks::Frozen,
        tap,
        volumes: Vec::new(),
        root: None,
        limit: LIMIT,
    }
}

/// Adopts the VM of a sandbox whose daemon has ended.
pub(super) async fn adopt(directory: &Path) -> Result<Arc<dyn Vm>> {
    let id = directory.file_name().and_then(|name| name.to_str()).context("an id")?.parse()?;
    Ok(Qemu::engine(PROGRAM.into()).adopt(id, directory).await?)
}

/// Prints the memory that an idle fork does not share.
async fn memory(directory: &Path) -> Result<()> {
    tokio::time::sleep(Duration::from_secs(2)).await;
    let pid = vmm(directory)?;
    for field in ["Pss:", "Private_Dirty:", "Pss_Anon:"] {
        let what = format!("one idle fork's memory: {}", field.trim_end_matches(':'));
        println!("{what:44} {:>26.1} MiB", rollup_mib(pid, field)?);
    }
    Ok(())
}

async fn creates(daemon: &TestDaemon, wait: Option<Duration>) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    let (mut created, mut first) = (Vec::new(), Vec::new());
    for _ in 0..FEW {
        if let Some(wait) = wait {
            wait_for("the spare VM", || daemon.all_vmm_pids().len() == 1).await;
            tokio::time::sleep(wait).await;
        }
        let began = Instant::now();
        daemon.client.create(&named("bench")).await?;
        created.push(began.elapsed());
        let running = Instant::now();
        exec(daemon).await?;
        first.push(running.elapsed());
        times.push(began.elapsed());
        daemon.client.destroy("bench").await?;
    }
    show("  of that: POST /sandboxes", created);
    show("  of that: the first exec", first);
    Ok(times)
}

async fn exec(daemon: &TestDaemon) -> Result<()> {
    let ran = run(&daemon.client, "bench", &["true"]).await?;
    ensure!(ran.code == 0, "true failed");
    Ok(())
}

async fn sleeping(daemon: &mut TestDaemon, bare: Duration) -> Result<()> {
    let client = &daemon.client.clone();
    client.create(&named("bench")).await?;
    let (mut hot, mut warm, mut cold) = (Vec::new(), Vec::new(), Vec::new());
    exec(daemon).await?;
    for _ in 0..ROUNDS {
        let began = Instant::now();
        exec(daemon).await?;
        hot.push(began.elapsed());
        client.pause("bench").await?;
        let began = Instant::now();
        exec(daemon).await?;
        warm.push(began.elapsed());
    }
    for _ in 0..FEW {
        client.stop("bench").await?;
        let began = Instant::now();
        client.start("bench", &StartSandbox::default()).await?;
        exec(daemon).await?;
        cold.push(began.elapsed());
    }
    let added = median(&mut warm.clone()).as_secs_f64() - median(&mut hot.clone()).as_secs_f64();
    show("exec on a hot sandbox", hot);
    show("wake from warm, and exec", warm);
    println!("{:44} {:>26.2} ms", "  of that, by waking", added * 1e3);
    ratio("wake from cold, and exec", &cold, "a bare fork", bare);
    show("wake from cold, and exec", cold);
    client.destroy("bench").await?;
    snapshots(daemon).await
}

/// Measures diff snapshots against full ones, and diffs of more and more dirty pages.
async fn snapshots(daemon: &mut TestDaemon) -> Result<()> {
    let client = &daemon.client.clone();
    client.create(&named("bench")).await?;
    exec(daemon).await?;
    client.pause("bench").await?;
    let directory: PathBuf = daemon.sandbox_directories().remove(0);
    let mut full = Vec::new();
    for dirty_mib in [0_u64, 1, 10, 100, 300] {
        if dirty_mib > 0 {
            let script = format!(
                "mount -o remount,size=400m /dev/shm; head -c {dirty_mib}M /dev/urandom >/dev/shm/x"
            );
            let ran = run(client, "bench", &["sudo", "sh", "-c", &script]).await?;
            ensure!(ran.code == 0, "failed to dirty {dirty_mib} MiB");
            client.pause("bench").await?;
        }
        let place = directory.with_extension("bench");
        let mut diff = Vec::new();
        let mut bytes = 0;
        // QEMU's monitor serves one client at a time.
        daemon.terminate().await;
        let vm = adopt(&directory).await?;
        for _ in 0..5 {
            bytes = snapshot(vm.as_ref(), &place, MemoryKind::Diff, &mut diff).await?;
            if dirty_mib == 0 {
                snapshot(vm.as_ref(), &place, MemoryKind::Full, &mut full).await?;
            }
        }
        let what = format!("diff snapshot, {dirty_mib} MiB dirtied, {:.1} MiB written", mib(bytes));
        if dirty_mib == 0 {
            let base = median(&mut full);
            ratio("diff snapshot of an idle sandbox", &diff, "a full one", base);
            println!("{:44} {:>26.2} %", "  of its RAM, in bytes", 100.0 * mib(bytes) / 512.0);
        }
        show(&what, diff);
        drop(vm);
        daemon.serve().await;
    }
    show("full snapshot of an idle 512 MiB sandbox", full);
    client.destroy("bench").await?;
    Ok(())
}

pub(super) async fn snapshot(
    vm: &dyn Vm,
    place: &Path,
    memory: MemoryKind,
    times: &mut Vec<Duration>,
) -> Result<u64> {
    let request = SnapshotRequest {
        directory: place.to_owned(),
        memory: Some(memory),
        disks: Disks::InPlace,
        copies: Vec::new(),
    };
    let began = Instant::now();
    let info = vm.capture(&request).await?.finish().await?;
    times.push(began.elapsed());
    std::fs::remove_dir_all(place)?;
    Ok(info.memory_bytes + info.device_bytes)
}

async fn forking(daemon: &TestDaemon) -> Result<()> {
    let client = &daemon.client;
    client.create(&CreateSandbox { keep_hot: true, ..named("bench") }).await?;
    exec(daemon).await?;
    let (mut paused, mut one, mut first) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..FEW {
        let began = Instant::now();
        let forks = client.fork("bench", &ForkSandbox::default()).await?;
        one.push(began.elapsed());
        let fork = &forks.sandboxes[0].id;
        let running = Instant::now();
        ensure!(run(client, fork, &["true"]).await?.code == 0, "true failed");
        first.push(running.elapsed());
        paused.push(Duration::from_micros(forks.parent_paused_us));
        client.destroy(fork).await?;
    }
    show("fork of an idle sandbox: its parent's pause", paused);
    for count in [1, 5] {
        at_once(daemon, count, true).await?;
    }
    let mut many = Vec::new();
    for round in 0..5 {
        many.push(at_once(daemon, 20, round == 0).await?);
    }
    ratio("20 forks until all answer", &many, "one", median(&mut one.clone()));
    show("fork until it answers", one);
    show("  and its first exec", first);
    show("20 forks until all answer", many);
    during_a_snapshot(daemon).await?;
    client.destroy("bench").await?;
    Ok(())
}

/// Prints how long a request that arrives while a sandbox is saved waits for its answer, and how
/// long the snapshot takes. The sandbox has written memory that has to go to the disk.
async fn during_a_snapshot(daemon: &TestDaemon) -> Result<()> {
    let client = &daemon.client;
    let write = "head -c 150000000 /dev/urandom >/dev/shm/written";
    let command = ["sh", "-c", write];
    ensure!(run(client, "bench", &command).await?.code == 0, "failed to write memory");
    let (mut answered, mut saved) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let began = Instant::now();
        let saving = async {
            let request = CreateSnapshot { name: "bench".to_owned() };
            client.create_snapshot("bench", &request).await?;
            anyhow::Ok(began.elapsed())
        };
        let asking = async {
            // Arrives after the request for the snapshot, and waits for its pause.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let asked = Instant::now();
            ensure!(run(client, "bench", &["true"]).await?.code == 0, "true failed");
            Ok(asked.elapsed())
        };
        let (saving, asking) = tokio::join!(saving, asking);
        answered.push(asking?);
        saved.push(saving?);
        client.delete_snapshot("bench").await?;
    }
    show("request during a snapshot of 150 MB: answered", answered);
    show("  the snapshot is on the disk", saved);
    Ok(())
}

/// Returns the process id of the VM in a directory.
fn vmm(directory: &Path) -> Result<u64> {
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(directory.join("vm.json"))?)?;
    record["pid"].as_u64().context("a pid")
}

/// Makes `count` forks at once and returns how long that took. With `tell_memory`, prints their
/// memory.
async fn at_once(daemon: &TestDaemon, count: u32, tell_memory: bool) -> Result<Duration> {
    let began = Instant::now();
    let request = ForkSandbox { count: Some(count), ..ForkSandbox::default() };
    let forks = daemon.client.fork("bench", &request).await?.sandboxes;
    let took = began.elapsed();
    if tell_memory {
        let ids: Vec<&str> = forks.iter().map(|fork| fork.id.as_str()).collect();
        memory_of_forks(daemon, &ids).await?;
    }
    for fork in forks {
        daemon.client.destroy(&fork.id).await?;
    }
    Ok(took)
}

/// Prints the median memory (PSS) of these idle forks.
async fn memory_of_forks(daemon: &TestDaemon, ids: &[&str]) -> Result<()> {
    tokio::time::sleep(Duration::from_secs(2)).await;
    let sandboxes = daemon.data_dir().join("sandboxes");
    let pss = ids.iter().map(|id| rollup_mib(vmm(&sandboxes.join(id))?, "Pss:"));
    let mut pss: Vec<f64> = pss.collect::<Result<_>>()?;
    pss.sort_by(f64::total_cmp);
    let what = format!("memory (PSS) of one of {} forks, median", pss.len());
    println!("{what:44} {:>26.1} MiB", pss[pss.len() / 2]);
    Ok(())
}

fn rollup_mib(pid: u64, field: &str) -> Result<f64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(mib(kib << 10))
}
