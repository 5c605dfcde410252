//! The engine as `bhatti_engine::conformance` wants it. Firecracker is the user's to install: `FIRECRACKER_BIN`, or on the path.

use bhatti_firecracker::{FirecrackerEngine, PROGRAM, check};
use bhatti_testkit::skip;

/// The engine, if it can run here.
async fn engine() -> Option<FirecrackerEngine> {
    let program = std::env::var("FIRECRACKER_BIN").unwrap_or_else(|_| PROGRAM.to_owned());
    match (check(program.as_ref()).await, bhatti_host::kvm::check()) {
        (Ok((program, _)), Ok(())) => return Some(FirecrackerEngine::new(program)),
        (Err(bhatti_firecracker::Unusable::NotInstalled { .. }), _) => {
            skip("firecracker engine", "no firecracker binary was found");
        }
        (Err(error), _) => skip("firecracker engine", &error.to_string()),
        (_, Err(error)) => skip("firecracker engine", &error.to_string()),
    }
    None
}

bhatti_testkit::conformance_tests!(engine().await);
