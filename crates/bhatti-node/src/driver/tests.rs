//! Drivers over a simulated engine.

use bhatti_testkit::{Found, change_store, wait_for};
use bhatti_types::{FailReason, SandboxState, TimeLimit, UserId};

use super::*;
use crate::UseError;
use crate::fixture::{Saved, TestData};

const RUNNING: SandboxState = SandboxState::Running;

#[tokio::test]
async fn destruction_that_fails_is_repeated_and_keeps_its_memory() {
    let place = TestData::new();
    let id = place.leave(1, RUNNING, Found::Running, Saved::No);
    let node = place.recover().await;
    let free_mib = || node.shared.admission.free_and_budget_mib().0;
    let before = free_mib();
    place.vms.refuse_removals(2);

    let refused = node.destroy(id, UserId::ADMIN).await.unwrap_err();

    assert!(matches!(refused, UseError::Destroy(DestroyError::Remove(_))), "{refused}");
    assert_eq!(free_mib(), before, "the VM may be alive");
    let row = place.store.get_sandbox(id).unwrap().unwrap();
    assert_eq!(row.state, SandboxState::Destroyed, "it is not listed, and its name is free");
    let entered = node.enter(id).await.map(|_| ()).unwrap_err();
    assert!(matches!(entered, UseError::Transition(TransitionError::Denied(Denied::Destroyed))));

    wait_for("the sandbox is destroyed", || place.store.get_sandbox(id).unwrap().is_none()).await;

    wait_for("its memory is free", || free_mib() > before).await;
    assert!(!place.directory(id).exists());
    let again = node.destroy(id, UserId::ADMIN).await.unwrap_err();
    assert!(matches!(again, UseError::NotFound(_)), "{again}");
}

#[tokio::test]
async fn removal_at_the_start_of_a_daemon_is_repeated() {
    let place = TestData::new();
    let id = place.leave(1, SandboxState::Creating, Found::Running, Saved::No);
    place.vms.refuse_removals(2);

    let _node = place.recover().await;

    wait_for("the sandbox is removed", || place.store.get_sandbox(id).unwrap().is_none()).await;
    assert_eq!(place.vms.get(id), None);
}

#[tokio::test]
async fn sandbox_fails_if_its_driver_panics_and_can_be_destroyed() {
    let place = TestData::new();
    let id = place.leave(1, RUNNING, Found::Nothing, Saved::Yes);
    let node = place.recover().await;

    // The simulated engine panics when it is to restore a VM.
    let woken = node.wake(id).await.unwrap_err();

    let failed = SandboxState::Failed(FailReason::DriverPanicked);
    wait_for("the sandbox has failed", || {
        place.store.get_sandbox(id).unwrap().unwrap().state == failed
    })
    .await;
    // It is answered before or after the sandbox is marked.
    assert!(woken.to_string().contains("the daemon failed while it changed"), "{woken}");
    let denied = Denied::Failed(FailReason::DriverPanicked);
    let again = node.wake(id).await.unwrap_err();
    assert!(matches!(again, UseError::Transition(TransitionError::Denied(d)) if d == denied));
    node.destroy(id, UserId::ADMIN).await.unwrap();
    assert_eq!(place.store.get_sandbox(id).unwrap(), None);
}

#[tokio::test]
async fn sandbox_is_still_kept_hot_after_its_driver_panicked() {
    let place = TestData::new();
    let id = place.leave(1, RUNNING, Found::Nothing, Saved::Yes);
    let node = place.recover().await;

    // It wakes the sandbox, and the simulated engine panics when it is to restore a VM.
    node.set_keep_hot(id, true).await.unwrap_err();

    let failed = Kind::Failed(FailReason::DriverPanicked);
    wait_for("the sandbox has failed", || node.handle(id).unwrap().access.kind() == failed).await;
    wait_for("its next driver keeps it hot", || node.handle(id).unwrap().access.keep_hot()).await;
    assert!(place.store.get_sandbox(id).unwrap().unwrap().spec.keep_hot);
}

/// A change that needs a running sandbox.
const OF_RUNNING: TimeLimitChange =
    TimeLimitChange { expires_at: None, only_later: false, only_running: true, on_timeout: None };

/// A limit that is over.
const OVER: TimeLimit = TimeLimit { expires_at: Some(1), on_timeout: OnTimeout::Stop };

#[tokio::test]
async fn stop_at_the_end_of_the_time_is_repeated_until_the_limit_is_removed() {
    let place = TestData::new();
    let id = place.leave(1, RUNNING, Found::Running, Saved::No);
    place.store.set_sandbox_time_limit(id, OVER).unwrap();
    let node = place.recover().await;

    // The simulated engine saves no memory, so each stop fails.
    wait_for("the second attempt to stop", || place.vms.captures() >= 2).await;

    let row = || place.store.get_sandbox(id).unwrap().unwrap();
    assert_eq!(row().time_limit, OVER);
    let change = TimeLimitChange { expires_at: Some(None), ..TimeLimitChange::default() };
    node.change_time_limit(id, change).await.unwrap();
    assert_eq!((row().state, row().time_limit.expires_at), (RUNNING, None));
    drop(node.enter(id).await.unwrap());
}

#[tokio::test]
async fn limit_of_a_running_sandbox_is_refused_for_a_stopped_one() {
    let place = TestData::new();
    let id = place.leave(1, SandboxState::Stopped, Found::Nothing, Saved::Yes);
    let node = place.recover().await;
    let change = TimeLimitChange { expires_at: Some(Some(u64::MAX / 2)), ..OF_RUNNING };

    assert!(node.change_time_limit(id, change).await.is_err());

    let row = place.store.get_sandbox(id).unwrap().unwrap();
    assert_eq!(row.time_limit.expires_at, None);
}

#[tokio::test]
async fn limit_that_is_over_is_removed_from_a_sandbox_that_does_not_run() {
    let place = TestData::new();
    // The first is as a daemon leaves it that dies after the stop.
    let states = [SandboxState::Stopped, SandboxState::Failed(FailReason::VmmExited)];
    let ids = [1, 2].map(|number| {
        let id = place.leave(number, states[usize::from(number) - 1], Found::Nothing, Saved::Yes);
        place.store.set_sandbox_time_limit(id, OVER).unwrap();
        id
    });

    let _node = place.recover().await;

    for (id, state) in ids.into_iter().zip(states) {
        let row = || place.store.get_sandbox(id).unwrap().unwrap();
        wait_for("the limit is removed", || row().time_limit.expires_at.is_none()).await;
        assert_eq!(row().state, state);
    }
}

#[tokio::test]
async fn merge_is_given_up_for_an_urgent_request_and_not_for_a_use() {
    let place = TestData::new();
    let id = place.leave(1, RUNNING, Found::Running, Saved::No);
    let node = Arc::new(place.recover().await);
    let merge = || {
        let (node, before) = (Arc::clone(&node), place.vms.merges());
        (tokio::spawn(async move { node.merge_disk(id).await }), before)
    };
    let (first, before) = merge();
    wait_for("the merge begins", || place.vms.merges() > before).await;

    drop(node.enter(id).await.unwrap());
    assert!(!first.is_finished(), "a use goes on beside the merge");
    // The second merge waits for its turn, and ends the first.
    let (second, before) = merge();
    assert!(!first.await.unwrap().unwrap(), "layers were merged");
    wait_for("the second merge begins", || place.vms.merges() > before).await;

    node.destroy(id, UserId::ADMIN).await.unwrap();

    assert!(second.await.unwrap().is_ok_and(|merged| !merged));
    assert_eq!(place.store.get_sandbox(id).unwrap(), None);
}

#[tokio::test]
async fn vm_that_cannot_be_adopted_is_ended() {
    let place = TestData::new();
    let id = place.leave(1, RUNNING, Found::Broken, Saved::No);

    let node = place.recover().await;

    assert_eq!(node.handle(id).unwrap().access.kind(), Kind::Failed(FailReason::VmmUnusable));
    assert_eq!(place.vms.get(id), None, "a failed sandbox must not run on");
}

#[tokio::test]
async fn failed_sandbox_whose_vm_is_alive_is_ended_by_the_next_daemon() {
    let place = TestData::new();
    let failed = SandboxState::Failed(FailReason::VmmExited);
    let id = place.leave(1, failed, Found::Running, Saved::No);

    let _node = place.recover().await;

    wait_for("the VM is ended", || place.vms.get(id).is_none()).await;
}

#[tokio::test]
async fn daemon_leaves_a_sandbox_that_another_daemon_has_claimed() {
    for (claim, vm) in [
        // A later daemon of this node has adopted the VM.
        ("UPDATE sandboxes SET epoch = epoch + 1", Some(Found::Running)),
        ("UPDATE sandboxes SET epoch = epoch + 1, node = '00000000000000ff'", None),
    ] {
        let place = TestData::new();
        let id = place.leave(1, RUNNING, Found::Running, Saved::No);
        let node = place.recover().await;
        change_store(place.data.path(), claim);

        let refused = node.stop(id).await.unwrap_err();

        assert!(
            matches!(
                &refused,
                UseError::Transition(TransitionError::Store(StoreError::Fenced(fenced)))
                    if *fenced == id
            ),
            "{refused}"
        );
        wait_for("the driver to leave", || node.shared.registry.get(id).is_none()).await;
        assert_eq!(place.vms.get(id), vm, "{claim}");
        assert_eq!(place.store.get_sandbox(id).unwrap().unwrap().state, RUNNING);
    }
}

#[tokio::test]
async fn sandbox_of_another_node_is_left_alone() {
    let place = TestData::new();
    let id = place.leave(1, SandboxState::Creating, Found::Running, Saved::No);
    change_store(place.data.path(), "UPDATE sandboxes SET node = '00000000000000ff'");

    let node = place.recover().await;

    assert!(node.shared.registry.get(id).is_none());
    assert_eq!(place.vms.get(id), Some(Found::Running));
    let state = place.store.get_sandbox(id).unwrap().unwrap().state;
    assert_eq!(state, SandboxState::Creating, "its row is not this node's to change");
}
