//! What the engine can do that the tests run on.

use crate::daemon::common_value;
use crate::skip;

/// Something that not every engine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Memory that can be saved: snapshots, forks, and processes that outlive a stop.
    SavedMemory,
    /// A kernel of the guest's own, and all that root may do with one.
    OwnKernel,
    /// Restored VMs with other disks than the saved one: forks with volumes.
    ExchangedDisks,
    /// Connections into a VM that go on when its memory is saved while it runs.
    KeptStreams,
    /// Disks of layers, which are merged when there are many.
    LayeredDisks,
}

/// The engine that the tests run on.
#[must_use]
pub fn engine() -> String {
    common_value("engine").unwrap_or_else(|| "qemu".to_owned())
}

/// Whether the engine has something.
#[must_use]
pub fn engine_has(feature: Feature) -> bool {
    match feature {
        Feature::SavedMemory | Feature::OwnKernel => engine() != "docker",
        Feature::ExchangedDisks | Feature::KeptStreams | Feature::LayeredDisks => {
            engine() == "qemu"
        }
    }
}

/// Whether a test, or the rest of it, can run; if not, that is said.
#[must_use]
pub fn needs(feature: Feature) -> bool {
    let has = engine_has(feature);
    if !has {
        let why = match feature {
            Feature::SavedMemory => "the memory of a container cannot be saved",
            Feature::OwnKernel => "a container has no kernel of its own",
            Feature::ExchangedDisks => "a restored VM has the disks of the saved one",
            Feature::KeptStreams => "connections into a VM end when it is saved",
            Feature::LayeredDisks => "a disk is one file",
        };
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        skip(&format!("{test} with engine {}", engine()), why);
    }
    has
}
