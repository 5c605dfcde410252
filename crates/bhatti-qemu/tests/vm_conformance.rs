//! Runs `bhatti_engine::conformance` on the QEMU engine.

use bhatti_qemu::{PROGRAM, Qemu};

bhatti_testkit::conformance_tests!(Some(Qemu::engine(PROGRAM.into())));
