//! Recovery from every combination of row and VMM, with a simulated engine. The daemon's tests
//! `vm_sandbox`, `vm_faults` and `vm_thermal` do the same with real VMs.

use std::time::Duration;

use bhatti_testkit::{Found, change_store};
use bhatti_types::{SandboxSpec, SnapshotId, Thermal, UserId};

use super::*;
use crate::fixture::{Saved, TestData};

const RUNNING: SandboxState = SandboxState::Running;
const STOPPED: SandboxState = SandboxState::Stopped;
const CRASHED: SandboxState = SandboxState::Failed(FailReason::VmmExited);
const MISSING: SandboxState = SandboxState::Failed(FailReason::VmmMissing);
const UNUSABLE: SandboxState = SandboxState::Failed(FailReason::VmmUnusable);

#[tokio::test]
async fn every_row_and_vmm_recover_to_the_same_state_twice() {
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
    let place = TestData::new();
    let numbered = (1..).zip(&cases);
    let ids: Vec<SandboxId> = numbered
        .map(|(number, (state, found, saved, _))| place.leave(number, *state, *found, *saved))
        .collect();

    for round in 1..=2 {
        let node = place.recover().await;
        for (id, (state, found, saved, expected)) in ids.iter().zip(&cases) {
            let what = format!("round {round}: {state:?}, {found:?}, {saved:?}");
            let row = place.store.get_sandbox(*id).unwrap();
            let truth = row.as_ref().map(|row| (row.state, node.thermal(row.id)));
            assert_eq!(truth, *expected, "{what}");
            assert_eq!(place.directory(*id).exists(), expected.is_some(), "{what}");
            if expected.is_none() {
                assert_eq!(place.vms.get(*id), None, "{what}: its VMM lives");
            }
        }
    }
    let used_again = place.directory(ids[4]);
    assert!(used_again.join("snapshot").exists() && !used_again.join("snapshot.used").exists());
}

#[tokio::test]
async fn interrupted_stop_is_finished_or_undone() {
    let place = TestData::new();
    // Its VM cannot be saved, so the sandbox runs on and loses nothing.
    let id = place.leave(1, STOPPED, Found::Running, Saved::No);

    let _node = place.recover().await;

    let undone = async {
        while place.store.get_sandbox(id).unwrap().unwrap().state != RUNNING {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), undone).await.unwrap();
    assert_eq!(place.vms.get(id), Some(Found::Running));
}

#[tokio::test]
async fn sandbox_unknown_to_the_store_is_left_alone() {
    let place = TestData::new();
    let id = place.leave(1, RUNNING, Found::Running, Saved::Yes);
    // A store that was restored from an older copy.
    place.store.delete_sandbox(&place.store.claim(id).unwrap()).unwrap();
    std::fs::create_dir(place.data.path().join("sandboxes/not-an-id")).unwrap();

    let node = place.recover().await;

    assert!(place.directory(id).join("snapshot").exists());
    assert_eq!(place.vms.get(id), Some(Found::Running));
    assert!(place.data.path().join("sandboxes/not-an-id").exists());
    assert_eq!(node.taking_up(), 0);
}

#[tokio::test]
async fn removal_of_a_sandbox_with_a_damaged_row_is_finished() {
    let place = TestData::new();
    let id = place.leave(1, SandboxState::Destroyed, Found::Running, Saved::No);
    change_store(place.data.path(), "UPDATE sandboxes SET memory_mib = 1");

    place.recover().await;

    assert!(!place.directory(id).exists());
    assert_eq!(place.vms.get(id), None, "its VMM lives");
    assert_eq!(place.store.list_all_sandbox_ids().unwrap(), []);
}

#[tokio::test]
async fn row_with_a_damaged_id_does_not_block_other_sandboxes() {
    let place = TestData::new();
    let id = place.leave(1, RUNNING, Found::Running, Saved::No);
    let sound = place.leave(2, RUNNING, Found::Running, Saved::No);
    change_store(place.data.path(), "UPDATE sandboxes SET id = 'x' WHERE name = 's1'");

    let node = place.recover().await;

    assert_eq!(node.thermal(sound), Some(Thermal::Hot));
    assert_eq!(place.store.list_sandbox_ids(UserId::ADMIN).unwrap(), [sound]);
    assert!(place.directory(id).exists(), "it is left alone");
}

#[tokio::test]
async fn interrupted_boot_is_ended_and_stale_marks_are_removed() {
    let place = TestData::new();
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

    let node = place.recover().await;

    for (id, (state, found, saved, expected)) in ids.iter().zip(&cases) {
        let truth = || {
            let row = place.store.get_sandbox(*id).unwrap();
            row.map(|row| (row.state, node.thermal(row.id)))
        };
        let is_settled = || truth() == *expected && place.vms.get(*id).is_none();
        let is_settled = || is_settled() || (*found == Found::Nothing && truth() == *expected);
        bhatti_testkit::wait_for(&format!("{state:?}, {found:?}, {saved:?}"), is_settled).await;
    }
    assert!(!place.directory(ids[2]).join("booting").exists(), "its VM is gone");
    assert!(!place.directory(ids[2]).join("snapshot.used").exists(), "nothing uses it any more");
    assert!(!place.directory(ids[4]).join("booting").exists(), "a later daemon must not boot it");
    assert!(place.directory(ids[4]).join("snapshot").exists());
}

#[tokio::test]
async fn memory_is_taken_from_the_sandbox_that_was_used_least_recently() {
    let place = TestData::new();
    let [first, second, third, hot, stopped] = [
        (1, RUNNING, Found::Paused),
        (2, RUNNING, Found::Paused),
        (3, RUNNING, Found::Paused),
        (4, RUNNING, Found::Running),
        (5, STOPPED, Found::Nothing),
    ]
    .map(|(number, state, found)| place.leave(number, state, found, Saved::No));
    let node = place.recover().await;
    let registry = &node.shared.registry;
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
async fn interrupted_deletion_of_a_snapshot_is_undone_if_its_row_exists() {
    let place = TestData::new();
    let id = SnapshotId::from_entropy([8; 8]);
    place.store.insert_snapshot(snapshot_row(id)).unwrap();
    std::fs::create_dir(place.data.path().join(format!("snapshots/{id}.tmp"))).unwrap();

    place.recover().await;

    assert!(place.data.path().join(format!("snapshots/{id}")).exists());
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

#[tokio::test]
async fn unfinished_snapshots_without_a_row_are_removed() {
    let place = TestData::new();
    let snapshots = place.data.path().join("snapshots");
    let id = SandboxId::from_entropy([7; 8]);
    for name in [format!(".save-{id}"), ".fork-abc".to_owned(), "x.tmp".to_owned()] {
        std::fs::create_dir(snapshots.join(name)).unwrap();
    }

    place.recover().await;

    assert_eq!(std::fs::read_dir(snapshots).unwrap().count(), 0);
}
