//! What becomes of every row and every VMM, without VMs. The same with real ones: `vm_sandbox`, `vm_faults` and `vm_thermal` of the daemon.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{
    Accelerator, AgentChannel, AgentStream, BootError, Capabilities, Captured, ChannelError,
    Engine, RemoveError, RestoreError, RestoreSpec, SnapshotError, SnapshotRequest, Staged, Vm,
    VmSpec, VmmError,
};
use bhatti_host::process::Usage;
use bhatti_image::ImageStore;
use bhatti_secret::SecretKey;
use bhatti_store::{EventFilter, NewSandbox, Store, VolumeRow, VolumeWork};
use bhatti_testkit::change_store;
use bhatti_types::{Allowance, SandboxSpec, UserId, VolumeId, VolumeMib};
use parking_lot::Mutex;

use super::*;
use crate::{Config, NetworkConfig, SnapshotOpError, ThermalConfig, UseError};

/// What is found of a sandbox's VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Running,
    Paused,
    Broken,
    Nothing,
}

/// The reality that a daemon comes to.
#[derive(Default)]
struct Reality {
    found: Mutex<HashMap<SandboxId, Found>>,
}

struct FoundVm {
    runs: bool,
}

#[async_trait]
impl Engine for Reality {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "reality",
            accelerator: Some(Accelerator::Tcg),
            saves_memory: true,
            shares_kernel: false,
            vmm_mib: 48,
            machine: "m".to_owned(),
            exchanges_disks: true,
        }
    }

    async fn boot(&self, _: &VmSpec) -> Result<Arc<dyn Vm>, BootError> {
        panic!("recovery boots nothing")
    }

    async fn stage(&self, _: &RestoreSpec) -> Result<Box<dyn Staged>, RestoreError> {
        panic!("recovery restores nothing")
    }

    async fn adopt(&self, id: SandboxId, _: &Path) -> Result<Arc<dyn Vm>, AdoptError> {
        match self.found.lock().get(&id).copied().unwrap_or(Found::Nothing) {
            Found::Nothing => Err(AdoptError::Gone),
            Found::Broken => Err(AdoptError::Broken {
                step: "connect",
                source: io::ErrorKind::ConnectionRefused.into(),
            }),
            found => Ok(Arc::new(FoundVm { runs: found == Found::Running })),
        }
    }

    async fn kill(&self, id: SandboxId, _: &Path) -> Result<(), RemoveError> {
        self.found.lock().remove(&id);
        Ok(())
    }

    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        self.found.lock().remove(&id);
        drop(std::fs::remove_dir_all(directory));
        Ok(())
    }
}

struct Deaf;

#[async_trait]
impl AgentChannel for Deaf {
    async fn open(&self, _: u32) -> Result<Box<dyn AgentStream>, ChannelError> {
        Err(ChannelError(io::ErrorKind::ConnectionRefused.into()))
    }
}

#[async_trait]
impl Vm for FoundVm {
    fn channel(&self) -> Arc<dyn AgentChannel> {
        Arc::new(Deaf)
    }

    async fn is_running(&self) -> Result<bool, VmmError> {
        Ok(self.runs)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmmError> {
        Ok(())
    }

    async fn capture(&self, _: &SnapshotRequest) -> Result<Box<dyn Captured>, SnapshotError> {
        Err(SnapshotError::Unsupported("there is no VM"))
    }

    async fn ended(&self) {
        std::future::pending::<()>().await;
    }

    fn usage(&self) -> io::Result<Usage> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn console_tail(&self) -> String {
        String::new()
    }
}

/// What is found of a sandbox's snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saved {
    No,
    Yes,
    Used,
    Ran,
}

/// A data directory with a store.
struct Place {
    data: tempfile::TempDir,
    store: Arc<Store>,
    reality: Arc<Reality>,
}

impl Place {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        for directory in ["sandboxes", "snapshots", "templates", "volumes"] {
            std::fs::create_dir(data.path().join(directory)).unwrap();
        }
        let store = Arc::new(Store::open(data.path()).unwrap());
        Self { data, store, reality: Arc::default() }
    }

    fn directory(&self, id: SandboxId) -> std::path::PathBuf {
        self.data.path().join("sandboxes").join(id.to_string())
    }

    /// Puts a sandbox in place as an earlier daemon left it.
    fn leave(&self, number: u8, state: SandboxState, found: Found, saved: Saved) -> SandboxId {
        let id = SandboxId::from_entropy([number; 8]);
        let spec =
            SandboxSpec::plain(format!("s{number}").parse().unwrap(), "minimal".parse().unwrap());
        let (origin, agent_token) = ("boot".to_owned(), String::new());
        let new = NewSandbox {
            id,
            owner: UserId::ADMIN,
            spec,
            origin,
            agent_token,
            expires_at: None,
            volumes: Vec::new(),
        };
        self.store.insert_sandbox(new).unwrap();
        self.store.set_sandbox_state(id, state).unwrap();
        let directory = self.directory(id);
        std::fs::create_dir(&directory).unwrap();
        match saved {
            Saved::No => {}
            Saved::Yes => std::fs::create_dir(directory.join("snapshot")).unwrap(),
            Saved::Used => std::fs::create_dir(directory.join("snapshot.used")).unwrap(),
            Saved::Ran => std::fs::create_dir_all(directory.join("snapshot.used/ran")).unwrap(),
        }
        self.reality.found.lock().insert(id, found);
        id
    }

    async fn recover(&self) -> Supervisor {
        let path = self.data.path();
        let config = Config {
            sandboxes_dir: path.join("sandboxes"),
            images: ImageStore::new(path),
            lohar: path.join("lohar"),
            boot_limit: Duration::from_secs(1),
            snapshots_dir: path.join("snapshots"),
            templates_dir: path.join("templates"),
            templates_bytes: 0,
            template_hostname: "template".parse().unwrap(),
            ready_vmms: 0,
            ready_forks: 0,
            memory_budget_mib: 4096,
            secret_key: SecretKey::open(path, false).unwrap(),
            thermal: ThermalConfig {
                warm_after: Duration::from_secs(3600),
                cold_after: Duration::from_secs(3600),
            },
            volumes_dir: path.join("volumes"),
            network: NetworkConfig {
                host: Err("this is a test".to_owned()),
                range: "10.213.0.0/16".parse().unwrap(),
                allowable: Allowance::default(),
                reach_host: false,
            },
            fault: None,
        };
        let engine: Arc<dyn Engine> = Arc::clone(&self.reality) as _;
        let supervisor = Supervisor::new(config, Arc::clone(&self.store), engine);
        supervisor.recover().await.unwrap().finished().await;
        supervisor
    }
}

const RUNNING: SandboxState = SandboxState::Running;
const STOPPED: SandboxState = SandboxState::Stopped;
const CRASHED: SandboxState = SandboxState::Failed(FailReason::VmmExited);
const MISSING: SandboxState = SandboxState::Failed(FailReason::VmmMissing);
const UNUSABLE: SandboxState = SandboxState::Failed(FailReason::VmmUnusable);

#[tokio::test]
async fn every_row_and_reality_come_to_one_truth_however_often() {
    use self::Saved::{No, Ran, Used, Yes};
    use Found::{Broken, Nothing, Paused, Running};
    use Thermal::{Cold, Hot, Warm};
    let cases = [
        (RUNNING, Running, No, Some((RUNNING, Some(Hot)))),
        (RUNNING, Running, Used, Some((RUNNING, Some(Hot)))),
        (RUNNING, Paused, No, Some((RUNNING, Some(Warm)))),
        (RUNNING, Nothing, Yes, Some((RUNNING, Some(Cold)))),
        (RUNNING, Nothing, Used, Some((RUNNING, Some(Cold)))),
        (RUNNING, Nothing, Ran, Some((MISSING, None))),
        (RUNNING, Nothing, No, Some((MISSING, None))),
        (RUNNING, Broken, No, Some((UNUSABLE, None))),
        (STOPPED, Nothing, Yes, Some((STOPPED, None))),
        (STOPPED, Nothing, No, Some((STOPPED, None))),
        (CRASHED, Nothing, No, Some((CRASHED, None))),
        (SandboxState::Creating, Running, No, None),
        (SandboxState::Creating, Nothing, No, None),
        (SandboxState::Destroyed, Running, Yes, None),
        (SandboxState::Destroyed, Nothing, No, None),
    ];
    let place = Place::new();
    let numbered = (1..).zip(&cases);
    let ids: Vec<SandboxId> = numbered
        .map(|(number, (state, found, saved, _))| place.leave(number, *state, *found, *saved))
        .collect();

    for round in 1..=2 {
        let supervisor = place.recover().await;
        for (id, (state, found, saved, expected)) in ids.iter().zip(&cases) {
            let what = format!("round {round}: {state:?}, {found:?}, {saved:?}");
            let row = place.store.get_sandbox(*id).unwrap();
            let truth = row.as_ref().map(|row| (row.state, supervisor.thermal(row.id)));
            assert_eq!(truth, *expected, "{what}");
            assert_eq!(place.directory(*id).exists(), expected.is_some(), "{what}");
            if expected.is_none() {
                assert_eq!(place.reality.found.lock().get(id), None, "{what}: its VMM lives");
            }
        }
    }
    let used_again = place.directory(ids[4]);
    assert!(used_again.join("snapshot").exists() && !used_again.join("snapshot.used").exists());
}

#[tokio::test]
async fn stop_that_was_cut_off_is_finished_or_undone() {
    let place = Place::new();
    // Its VM cannot be saved: then it goes on, rather than being lost.
    let id = place.leave(1, STOPPED, Found::Running, Saved::No);

    let _supervisor = place.recover().await;

    let undone = async {
        while place.store.get_sandbox(id).unwrap().unwrap().state != RUNNING {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), undone).await.unwrap();
    assert_eq!(place.reality.found.lock()[&id], Found::Running);
}

#[tokio::test]
async fn what_the_store_does_not_know_is_left_alone() {
    let place = Place::new();
    let id = place.leave(1, RUNNING, Found::Running, Saved::Yes);
    // A store that was restored from an older copy.
    place.store.delete_sandbox(id).unwrap();
    std::fs::create_dir(place.data.path().join("sandboxes/not-an-id")).unwrap();

    let supervisor = place.recover().await;

    assert!(place.directory(id).join("snapshot").exists());
    assert_eq!(place.reality.found.lock()[&id], Found::Running);
    assert!(place.data.path().join("sandboxes/not-an-id").exists());
    assert_eq!(supervisor.count().unwrap(), 0);
}

#[tokio::test]
async fn sandbox_whose_row_is_damaged_is_left_alone_until_it_is_destroyed() {
    let place = Place::new();
    let id = place.leave(1, RUNNING, Found::Running, Saved::No);
    let sound = place.leave(2, RUNNING, Found::Running, Saved::No);
    change_store(place.data.path(), "UPDATE sandboxes SET memory_mib = 1 WHERE name = 's1'");

    let supervisor = place.recover().await;

    assert!(place.directory(id).exists());
    assert_eq!(place.reality.found.lock()[&id], Found::Running);
    let started = supervisor.start(UserId::ADMIN, "s1", false).await.unwrap_err();
    assert!(started.to_string().contains("damaged"), "{started}");

    supervisor.destroy(UserId::ADMIN, "s1").await.unwrap();

    let events =
        place.store.list_events(&EventFilter { limit: 10, ..EventFilter::default() }).unwrap();
    assert!(events.iter().any(|event| event.kind == "sandbox.destroyed"), "{events:?}");
    assert!(!place.directory(id).exists());
    assert_eq!(place.reality.found.lock().get(&id), None, "its VMM lives");
    let again = supervisor.destroy(UserId::ADMIN, "s1").await.unwrap_err();
    assert!(matches!(again, UseError::NotFound(_)), "{again}");
    assert_eq!(supervisor.thermal(sound), Some(Thermal::Hot));
}

#[tokio::test]
async fn removal_of_a_sandbox_with_a_damaged_row_is_finished() {
    let place = Place::new();
    let id = place.leave(1, SandboxState::Destroyed, Found::Running, Saved::No);
    change_store(place.data.path(), "UPDATE sandboxes SET memory_mib = 1");

    place.recover().await;

    assert!(!place.directory(id).exists());
    assert_eq!(place.reality.found.lock().get(&id), None, "its VMM lives");
    assert_eq!(place.store.list_all_sandbox_ids().unwrap(), []);
}

#[tokio::test]
async fn row_with_a_damaged_id_keeps_no_other_sandbox_down() {
    let place = Place::new();
    let id = place.leave(1, RUNNING, Found::Running, Saved::No);
    let sound = place.leave(2, RUNNING, Found::Running, Saved::No);
    change_store(place.data.path(), "UPDATE sandboxes SET id = 'x' WHERE name = 's1'");

    let supervisor = place.recover().await;

    assert_eq!(supervisor.thermal(sound), Some(Thermal::Hot));
    assert_eq!(place.store.list_sandbox_ids(UserId::ADMIN).unwrap(), [sound]);
    assert!(place.directory(id).exists(), "it is left alone");
}

#[tokio::test]
async fn interrupted_boot_is_ended_and_stale_marks_are_removed() {
    let place = Place::new();
    let mark = |id| std::fs::write(place.directory(id).join("booting"), "").unwrap();
    let cases = [
        // Without images, the boot that follows fails.
        (RUNNING, Found::Running, Saved::Ran, Some((UNUSABLE, None))),
        (RUNNING, Found::Nothing, Saved::No, Some((UNUSABLE, None))),
        (STOPPED, Found::Running, Saved::Ran, Some((STOPPED, None))),
        (CRASHED, Found::Running, Saved::No, Some((CRASHED, None))),
        // A mark that could not be removed, beside the memory of a later stop.
        (RUNNING, Found::Nothing, Saved::Yes, Some((RUNNING, Some(Thermal::Cold)))),
    ];
    let numbered = (1..).zip(&cases);
    let ids: Vec<SandboxId> = numbered
        .map(|(n, (state, found, saved, _))| place.leave(n, *state, *found, *saved))
        .collect();
    ids.iter().for_each(|id| mark(*id));

    let supervisor = place.recover().await;

    for (id, (state, found, saved, expected)) in ids.iter().zip(&cases) {
        let truth = || {
            let row = place.store.get_sandbox(*id).unwrap();
            row.map(|row| (row.state, supervisor.thermal(row.id)))
        };
        let is_settled = || truth() == *expected && !place.reality.found.lock().contains_key(id);
        let is_settled = || is_settled() || (*found == Found::Nothing && truth() == *expected);
        bhatti_testkit::wait_for(&format!("{state:?}, {found:?}, {saved:?}"), is_settled).await;
    }
    assert!(!place.directory(ids[2]).join("booting").exists(), "its VM is gone");
    assert!(!place.directory(ids[2]).join("snapshot.used").exists(), "nothing uses it any more");
    assert!(!place.directory(ids[4]).join("booting").exists(), "a later daemon must not boot it");
    assert!(place.directory(ids[4]).join("snapshot").exists());
}

#[tokio::test]
async fn snapshot_stays_whole_if_the_store_refuses_to_delete_it() {
    let place = Place::new();
    let id = SandboxId::from_entropy([8; 8]);
    place.store.insert_snapshot(snapshot_row(id)).unwrap();
    let file = place.data.path().join(format!("snapshots/{id}/memory"));
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "pages").unwrap();
    let supervisor = place.recover().await;
    let refusal =
        "CREATE TRIGGER refuse BEFORE DELETE ON snapshots BEGIN SELECT RAISE(ABORT, 'no'); END";
    change_store(place.data.path(), refusal);

    let refused = supervisor.delete_snapshot(UserId::ADMIN, "saved").await;

    assert!(matches!(refused, Err(SnapshotOpError::Store(_))), "{refused:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "pages");
    assert!(supervisor.find_snapshot(UserId::ADMIN, "saved").is_ok());

    change_store(place.data.path(), "DROP TRIGGER refuse");
    supervisor.delete_snapshot(UserId::ADMIN, "saved").await.unwrap();

    assert_eq!(std::fs::read_dir(place.data.path().join("snapshots")).unwrap().count(), 0);
}

#[tokio::test]
async fn memory_is_taken_from_the_sandbox_that_was_used_least_recently() {
    let place = Place::new();
    let [first, second, third, hot, stopped] = [
        (1, RUNNING, Found::Paused),
        (2, RUNNING, Found::Paused),
        (3, RUNNING, Found::Paused),
        (4, RUNNING, Found::Running),
        (5, STOPPED, Found::Nothing),
    ]
    .map(|(number, state, found)| place.leave(number, state, found, Saved::No));
    let supervisor = place.recover().await;
    let registry = &supervisor.shared.registry;
    for id in [second, third, first] {
        registry.with(id, |handle| handle.access.touch());
    }

    let mut taken = HashSet::new();
    for expected in [second, third, first] {
        let (id, _) = registry.longest_idle(&taken).unwrap();
        assert_eq!(id, expected);
        taken.insert(id);
    }

    let left = registry.longest_idle(&taken).map(|(id, _)| id);
    assert_eq!(left, None, "neither {hot}, which is in use, nor {stopped}, which has no memory");
}

#[tokio::test]
async fn snapshot_that_was_being_deleted_is_back_if_its_row_is() {
    let place = Place::new();
    let id = SandboxId::from_entropy([8; 8]);
    place.store.insert_snapshot(snapshot_row(id)).unwrap();
    std::fs::create_dir(place.data.path().join(format!("snapshots/{id}.tmp"))).unwrap();

    place.recover().await;

    assert!(place.data.path().join(format!("snapshots/{id}")).exists());
}

fn snapshot_row(id: SandboxId) -> bhatti_store::SnapshotRow {
    let spec = SandboxSpec::plain("s".parse().unwrap(), "minimal".parse().unwrap());
    bhatti_store::SnapshotRow {
        id,
        owner: UserId::ADMIN,
        name: "saved".parse().unwrap(),
        sandbox_id: id,
        sandbox_name: spec.name,
        cpus: spec.cpus,
        memory: spec.memory,
        disk: None,
        agent_token: String::new(),
        is_full: true,
        memory_bytes: 0,
        image: spec.image,
        network: spec.network,
        volumes: Vec::new(),
        created_at: String::new(),
    }
}

#[tokio::test]
async fn snapshots_that_were_being_made_are_finished_or_gone() {
    let place = Place::new();
    let snapshots = place.data.path().join("snapshots");
    let id = SandboxId::from_entropy([7; 8]);
    for name in [format!("{SAVING}{id}"), format!("{FORKING}abc"), "x.tmp".to_owned()] {
        std::fs::create_dir(snapshots.join(name)).unwrap();
    }

    place.recover().await;

    assert_eq!(std::fs::read_dir(snapshots).unwrap().count(), 0);
}

/// A volume's row, and a directory of this name for it.
fn leave_volume(place: &Place, number: u8, has_row: bool, prefix: &str) -> VolumeId {
    let id = VolumeId::from_entropy([number; 8]);
    if has_row {
        let row = VolumeRow {
            id,
            owner: UserId::ADMIN,
            name: format!("v{number}").parse().unwrap(),
            size: VolumeMib::try_from(16).unwrap(),
            work: None,
            created_at: String::new(),
        };
        place.store.insert_volume(row).unwrap();
    }
    let directory = place.data.path().join("volumes").join(format!("{prefix}{id}"));
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("volume.ext4"), [number]).unwrap();
    id
}

#[tokio::test]
async fn volumes_with_a_row_are_in_place_and_no_others_are_removed_but_unfinished_ones() {
    let place = Place::new();
    let made = leave_volume(&place, 1, true, ".make-");
    let deleted_not_quite = leave_volume(&place, 2, true, ".gone-");
    let settled = leave_volume(&place, 3, true, "");
    let unmade = leave_volume(&place, 4, false, ".make-");
    let gone = leave_volume(&place, 5, false, ".gone-");
    // Of a store that is an older copy.
    let unknown = leave_volume(&place, 6, false, "");
    place.store.begin_volume_work(settled, VolumeWork::Clone, None).unwrap();

    for _ in 0..2 {
        place.recover().await;
    }

    let file = |id: VolumeId| place.data.path().join(format!("volumes/{id}/volume.ext4"));
    for (id, number) in [(made, 1), (deleted_not_quite, 2), (settled, 3), (unknown, 6)] {
        assert_eq!(std::fs::read(file(id)).unwrap(), [number]);
    }
    assert!(!file(unmade).exists() && !file(gone).exists());
    assert_eq!(std::fs::read_dir(place.data.path().join("volumes")).unwrap().count(), 4);
    let free = place.store.begin_volume_work(settled, VolumeWork::Clone, None);
    assert!(free.is_ok(), "whoever worked on it is gone: {free:?}");
}

#[tokio::test]
async fn volume_whose_growing_failed_can_be_made_as_large_again() {
    let size = |mib| VolumeMib::try_from(mib).unwrap();
    let place = Place::new();
    let supervisor = place.recover().await;
    let made = supervisor.create_volume(UserId::ADMIN, "data".parse().unwrap(), size(16));
    let id = made.await.unwrap().row.id;
    let file = place.data.path().join(format!("volumes/{id}/volume.ext4"));
    // As it is left by a tool that fails: a larger file, on record as what it takes, with a smaller file system.
    place.store.begin_volume_work(id, VolumeWork::Resize, Some(size(32))).unwrap();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(size(32).bytes()).unwrap();
    place.store.end_volume_work(id, size(32)).unwrap();

    let grown = supervisor.resize_volume(UserId::ADMIN, "data", size(32)).await.unwrap();

    assert_eq!((grown.row.size, size_in_mib(&file)), (size(32), 32));
}

/// The size of a file system in MiB, as it says itself.
fn size_in_mib(file: &std::path::Path) -> u64 {
    let superblock = std::fs::read(file).unwrap()[1024..2048].to_vec();
    let word = |at: usize| u32::from_le_bytes(superblock[at..at + 4].try_into().unwrap());
    (u64::from(word(4)) << (10 + word(24))) >> 20
}

#[tokio::test]
async fn volume_that_was_being_made_larger_is_finished() {
    let size = |mib| VolumeMib::try_from(mib).unwrap();
    // Before its file was made longer, and after.
    for longer in [false, true] {
        let place = Place::new();
        let earlier = place.recover().await;
        let made = earlier.create_volume(UserId::ADMIN, "data".parse().unwrap(), size(16));
        let id = made.await.unwrap().row.id;
        let file = place.data.path().join(format!("volumes/{id}/volume.ext4"));
        place.store.begin_volume_work(id, VolumeWork::Resize, Some(size(32))).unwrap();
        if longer {
            let file = std::fs::File::options().write(true).open(&file).unwrap();
            file.set_len(size(32).bytes()).unwrap();
        }

        place.recover().await;

        let row = async {
            loop {
                let row = place.store.find_volume(UserId::ADMIN, "data").unwrap().unwrap();
                if row.work.is_none() {
                    break row;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let row = tokio::time::timeout(Duration::from_secs(60), row).await.unwrap();
        assert_eq!((row.size, size_in_mib(&file)), (size(32), 32));
    }
}
