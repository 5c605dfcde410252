//! Control over a node with a simulated engine: damaged rows as users see them, refusals of the
//! store, and interrupted work on volumes.

use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::Engine;
use bhatti_image::ImageStore;
use bhatti_node::{Config, NetworkConfig, Node, RegistryConfig, ThermalConfig, UseError};
use bhatti_secret::SecretKey;
use bhatti_store::{EventFilter, NewSandbox, Store, VolumeRow, VolumeWork};
use bhatti_testkit::{Found, FoundVms, change_store};
use bhatti_types::{
    Allowance, SandboxId, SandboxSpec, SandboxState, SnapshotId, Thermal, TimeLimit, UserId,
    VolumeId, VolumeMib,
};

use crate::{Control, SnapshotOpError};

/// A data directory with a store.
struct TestData {
    data: tempfile::TempDir,
    store: Arc<Store>,
    vms: Arc<FoundVms>,
}

impl TestData {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        for directory in ["sandboxes", "snapshots", "templates", "volumes"] {
            std::fs::create_dir(data.path().join(directory)).unwrap();
        }
        let store = Arc::new(Store::open(data.path()).unwrap());
        Self { data, store, vms: Arc::default() }
    }

    fn directory(&self, id: SandboxId) -> std::path::PathBuf {
        self.data.path().join("sandboxes").join(id.to_string())
    }

    /// Leaves a running sandbox as an earlier daemon would.
    fn leave(&self, number: u8) -> SandboxId {
        let id = SandboxId::from_entropy([number; 8]);
        let spec =
            SandboxSpec::plain(format!("s{number}").parse().unwrap(), "minimal".parse().unwrap());
        let new = NewSandbox {
            id,
            owner: UserId::ADMIN,
            spec,
            origin: "boot".to_owned(),
            agent_token: String::new(),
            time_limit: TimeLimit::default(),
            volumes: Vec::new(),
        };
        self.store.insert_sandbox(new).unwrap();
        self.store
            .set_sandbox_state(&self.store.claim(id).unwrap(), SandboxState::Running)
            .unwrap();
        std::fs::create_dir(self.directory(id)).unwrap();
        self.vms.leave(id, Found::Running);
        id
    }

    async fn recover(&self) -> Control {
        let path = self.data.path();
        let config = Config {
            sandboxes_dir: path.join("sandboxes"),
            images: ImageStore::new(path),
            registries: RegistryConfig::default(),
            lohar: path.join("lohar"),
            boot_limit: Duration::from_secs(1),
            snapshots_dir: path.join("snapshots"),
            bases_dir: path.join("templates"),
            bases_bytes: 0,
            base_hostname: "template".parse().unwrap(),
            ready_vmms: 0,
            ready_forks: 0,
            memory_budget_mib: 4096,
            thermal: ThermalConfig {
                warm_after: Duration::from_secs(3600),
                cold_after: Duration::from_secs(3600),
            },
            volumes_dir: path.join("volumes"),
            network: NetworkConfig {
                host: Err("this is a test".to_owned()),
                range: "10.213.0.0/16".parse().unwrap(),
                reach_host: false,
            },
        };
        let engine: Arc<dyn Engine> = Arc::clone(&self.vms) as _;
        let control = crate::Config {
            secret_key: SecretKey::open(path, false).unwrap(),
            network_allowable: Allowance::default(),
            pulled_images_bytes: None,
        };
        let start_node = |plane| Node::new(config, Arc::clone(&self.store), engine, plane);
        let control = Control::new(control, Arc::clone(&self.store), start_node);
        control.recover().await.unwrap().finished().await;
        control
    }
}

#[tokio::test]
async fn sandbox_with_a_damaged_row_can_only_be_destroyed() {
    let place = TestData::new();
    let id = place.leave(1);
    let sound = place.leave(2);
    change_store(place.data.path(), "UPDATE sandboxes SET memory_mib = 1 WHERE name = 's1'");

    let control = place.recover().await;

    assert!(place.directory(id).exists());
    assert_eq!(place.vms.get(id), Some(Found::Running));
    let started = control.start(UserId::ADMIN, "s1", false).await.unwrap_err();
    assert!(started.to_string().contains("damaged"), "{started}");

    control.destroy(UserId::ADMIN, "s1").await.unwrap();

    let events =
        place.store.list_events(&EventFilter { limit: 10, ..EventFilter::default() }).unwrap();
    assert!(events.iter().any(|event| event.kind == "sandbox.destroyed"), "{events:?}");
    assert!(!place.directory(id).exists());
    assert_eq!(place.vms.get(id), None, "its VMM lives");
    let again = control.destroy(UserId::ADMIN, "s1").await.unwrap_err();
    assert!(matches!(again, UseError::NotFound(_)), "{again}");
    assert_eq!(control.thermal(sound), Some(Thermal::Hot));
}

#[tokio::test]
async fn snapshot_stays_whole_if_the_store_refuses_to_delete_it() {
    let place = TestData::new();
    let id = SnapshotId::from_entropy([8; 8]);
    place.store.insert_snapshot(snapshot_row(id)).unwrap();
    let file = place.data.path().join(format!("snapshots/{id}/memory"));
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "pages").unwrap();
    let control = place.recover().await;
    let refusal =
        "CREATE TRIGGER refuse BEFORE DELETE ON snapshots BEGIN SELECT RAISE(ABORT, 'no'); END";
    change_store(place.data.path(), refusal);

    let refused = control.delete_snapshot(UserId::ADMIN, "saved").await;

    assert!(matches!(refused, Err(SnapshotOpError::Store(_))), "{refused:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "pages");
    assert!(control.find_snapshot(UserId::ADMIN, "saved").is_ok());

    change_store(place.data.path(), "DROP TRIGGER refuse");
    control.delete_snapshot(UserId::ADMIN, "saved").await.unwrap();

    assert_eq!(std::fs::read_dir(place.data.path().join("snapshots")).unwrap().count(), 0);
}

fn snapshot_row(id: SnapshotId) -> bhatti_store::SnapshotRow {
    let spec = SandboxSpec::plain("s".parse().unwrap(), "minimal".parse().unwrap());
    bhatti_store::SnapshotRow {
        id,
        owner: UserId::ADMIN,
        kind: bhatti_store::SnapshotKind::Named,
        name: "saved".parse().unwrap(),
        sandbox_id: SandboxId::from_entropy([8; 8]),
        sandbox_name: spec.name,
        cpus: spec.cpus,
        memory: spec.memory,
        disk: None,
        agent_token: String::new(),
        is_full: true,
        memory_bytes: 0,
        image: spec.image,
        image_config: spec.image_config,
        network: spec.network,
        volumes: Vec::new(),
        created_at: String::new(),
    }
}

/// Creates a volume's directory with this prefix, and its row if `has_row` is set.
fn leave_volume(place: &TestData, number: u8, has_row: bool, prefix: &str) -> VolumeId {
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
async fn recovery_settles_volumes_and_removes_only_unfinished_ones() {
    let place = TestData::new();
    let made = leave_volume(&place, 1, true, ".make-");
    let deleted_not_quite = leave_volume(&place, 2, true, ".gone-");
    let settled = leave_volume(&place, 3, true, "");
    let unmade = leave_volume(&place, 4, false, ".make-");
    let gone = leave_volume(&place, 5, false, ".gone-");
    // As if the store were an older copy.
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
    assert!(free.is_ok(), "the earlier daemon's work has not ended: {free:?}");
}

#[tokio::test]
async fn volume_can_be_grown_after_a_resize_that_failed() {
    let size = |mib| VolumeMib::try_from(mib).unwrap();
    let place = TestData::new();
    let control = place.recover().await;
    let made = control.create_volume(UserId::ADMIN, "data".parse().unwrap(), size(16));
    let id = made.await.unwrap().row.id;
    let file = place.data.path().join(format!("volumes/{id}/volume.ext4"));
    // The state after a tool has failed: the file is larger, its size is recorded, and the file
    // system in it is smaller.
    place.store.begin_volume_work(id, VolumeWork::Resize, Some(size(32))).unwrap();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(size(32).bytes()).unwrap();
    place.store.end_volume_work(id, size(32)).unwrap();

    let grown = control.resize_volume(UserId::ADMIN, "data", size(32)).await.unwrap();

    assert_eq!((grown.row.size, size_in_mib(&file)), (size(32), 32));
}

/// Returns a file system's own record of its size, in MiB.
fn size_in_mib(file: &std::path::Path) -> u64 {
    let superblock = std::fs::read(file).unwrap()[1024..2048].to_vec();
    let word = |at: usize| u32::from_le_bytes(superblock[at..at + 4].try_into().unwrap());
    (u64::from(word(4)) << (10 + word(24))) >> 20
}

#[tokio::test]
async fn interrupted_resize_of_a_volume_is_finished() {
    let size = |mib| VolumeMib::try_from(mib).unwrap();
    // Before the file was lengthened, and after.
    for longer in [false, true] {
        let place = TestData::new();
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
