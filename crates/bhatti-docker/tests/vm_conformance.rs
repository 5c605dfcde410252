//! Runs `bhatti_engine::conformance` on the Docker engine. The tests use the Docker daemon at
//! `DOCKER_SOCK`, or at the default socket; they do not start one.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use bhatti_docker::{DockerEngine, SOCKET, check};
use bhatti_engine::VmSpec;
use bhatti_engine::conformance::Bench;
use bhatti_testkit::conformance::on_trial;
use bhatti_testkit::{dist, skip};

/// Returns the engine, if it can run here.
async fn engine() -> Option<DockerEngine> {
    let socket = std::env::var("DOCKER_SOCK").unwrap_or_else(|_| SOCKET.to_owned());
    match check(socket.as_ref()).await {
        Ok(found) => Some(DockerEngine::new(found, dist("lohar"))),
        Err(error) => {
            skip("docker engine", &error.to_string());
            None
        }
    }
}

bhatti_testkit::conformance_tests! { engine().await;
    vm_is_booted_adopted_killed_and_removed: lifecycle,
    vm_pause_and_resume_are_idempotent: thermal,
    disk_outlives_its_vm: keep_disk,
    volumes_are_mounted_and_outlive_their_vm: volumes,
    memory_that_cannot_be_saved_is_refused: no_snapshots,
}

/// Returns which of the namespaces `--mount` and `--net` root can make below a user namespace.
async fn namespaces(bench: &Bench<'_>, is_builder: bool) -> String {
    let spec = VmSpec { is_builder, ..bench.spec.clone() };
    let vm = bench.engine.boot(&spec).await.unwrap();
    let script = "for args in '--mount' '--net'; do
        unshare --user --map-root-user $args true 2>/dev/null && echo $args
    done; true";
    let made = bench.shell.run(vm.as_ref(), script).await;
    bench.engine.remove(spec.id, &spec.directory).await.unwrap();
    made
}

#[tokio::test]
async fn builder_makes_user_namespaces_without_networks_and_other_sandboxes_make_none() {
    let Some(engine) = engine().await else { return };
    on_trial(&engine, async |bench| {
        assert_eq!(namespaces(bench, false).await, "");
        assert_eq!(namespaces(bench, true).await, "--mount");
    })
    .await;
}
