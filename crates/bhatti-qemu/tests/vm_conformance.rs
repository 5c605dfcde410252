//! Runs `bhatti_engine::conformance` on the QEMU engine.

use bhatti_qemu::{PROGRAM, QemuEngine};

bhatti_testkit::conformance_tests!(Some(QemuEngine::new(PROGRAM.into())));
