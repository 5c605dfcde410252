//! The engine as `bhatti_engine::conformance` wants it.

use bhatti_qemu::{PROGRAM, QemuEngine};

bhatti_testkit::conformance_tests!(Some(QemuEngine::new(PROGRAM.into())));
