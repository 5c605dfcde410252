//! The engine as `bhatti_engine::conformance` wants it. Docker is the user's to run: `DOCKER_SOCK`, or where it usually listens.

use bhatti_docker::{DockerEngine, SOCKET, check};
use bhatti_testkit::{dist, skip};

/// The engine, if it can run here.
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
    vm_is_booted_taken_up_killed_and_removed: lifecycle,
    vm_pauses_and_resumes_however_often_it_is_told: thermal,
    disk_outlives_its_vm: keep_disk,
    volumes_are_mounted_and_outlive_their_vm: volumes,
    memory_that_cannot_be_saved_is_refused: no_snapshots,
}
