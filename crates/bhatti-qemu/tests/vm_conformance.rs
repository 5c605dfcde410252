//! Runs `bhatti_engine::conformance` on the QEMU engine.

use bhatti_qemu::{PROGRAM, Qemu};

bhatti_testkit::conformance_tests!(Some(Qemu::engine(PROGRAM.into())));

bhatti_testkit::conformance_tests! { Some(Qemu::engine(PROGRAM.into()));
    guest_that_waits_for_its_root_disk_is_restored_with_any: root_replacement,
}
