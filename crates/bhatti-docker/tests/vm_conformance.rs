//! Runs `bhatti_engine::conformance` on the Docker engine. The tests use the Docker daemon at
//! `DOCKER_SOCK`, or at the default socket; they do not start one.

use bhatti_docker::{DockerEngine, SOCKET, check};
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
