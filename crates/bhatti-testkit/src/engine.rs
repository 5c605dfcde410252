//! The engine that the tests run on, and its features.

use crate::daemon::common_value;
use crate::skip;

/// A feature that not every engine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Memory can be saved: snapshots, forks, and processes that outlive a stop.
    SavedMemory,
    /// The guest has its own kernel, which root in the guest controls.
    OwnKernel,
    /// A restored VM can have other disks than the saved VM, so forks can have volumes.
    ExchangedDisks,
    /// Connections into a VM survive saving its memory while it runs.
    KeptStreams,
    /// A restored VM can have another root disk, so images share the first part of the boot.
    ReplacedRoot,
    /// Disks consist of layers, which are merged when there are many.
    LayeredDisks,
}

/// Returns the name of the engine that the tests run on.
#[must_use]
pub fn engine() -> String {
    common_value("engine").unwrap_or_else(|| "qemu".to_owned())
}

/// Whether the engine has a feature.
#[must_use]
pub fn engine_has(feature: Feature) -> bool {
    match feature {
        Feature::SavedMemory | Feature::OwnKernel => engine() != "docker",
        Feature::ExchangedDisks
        | Feature::KeptStreams
        | Feature::ReplacedRoot
        | Feature::LayeredDisks => engine() == "qemu",
    }
}

/// Whether the engine has the feature that the test, or the rest of it, needs. Reports the skip if
/// it does not.
#[must_use]
pub fn needs(feature: Feature) -> bool {
    let has = engine_has(feature);
    if !has {
        let why = match feature {
            Feature::SavedMemory => "the memory of a container cannot be saved",
            Feature::OwnKernel => "a container has no kernel of its own",
            Feature::ExchangedDisks => "a restored VM has the disks of the saved one",
            Feature::KeptStreams => "connections into a VM end when it is saved",
            Feature::ReplacedRoot => "a restored VM has the root disk of the saved one",
            Feature::LayeredDisks => "a disk is one file",
        };
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        skip(&format!("{test} with engine {}", engine()), why);
    }
    has
}
