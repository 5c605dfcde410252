//! The vocabulary of bhatti: ids, names, sizes, specs and the sandbox lifecycle.
//!
//! Everything here is plain data that is checked once, at the edge. This crate has no I/O, no
//! clock and no randomness: a caller that makes an id supplies the entropy.

mod id;
mod image;
mod key;
mod label;
mod lifecycle;
mod name;
mod network;
mod quota;
mod report;
mod size;
mod spec;
mod time_limit;
mod volume;

pub use id::{NodeId, ParseIdError, SandboxId, SnapshotId, TemplateId, UserId, VolumeId};
pub use image::{ImageConfig, ParseRootError, RootName};
pub use key::{KeyScope, UnknownKeyScope};
pub use label::{InvalidLabel, Labels};
pub use lifecycle::{Denied, FailReason, SandboxState, Thermal, UnknownReason};
pub use name::{
    Alias, ImageName, KeyName, ParseAliasError, ParseNameError, ParseSecretNameError, SandboxName,
    SecretName, SnapshotName, TemplateName, UserName, VolumeName,
};
pub use network::{
    Allowance, InvalidAllowance, NEVER_REACHED, NetworkMode, NetworkSpec, UnknownNetworkMode,
};
pub use quota::{Quota, QuotaExceeded};
pub use report::Report;
pub use size::{CpuCount, DiskMib, MemoryMib, OutOfRange, VolumeMib};
pub use spec::{
    BUILDER_IMAGE, DEFAULT_IMAGE, ENVIRONMENT_BYTES_MAX, Environment, InvalidEnvironment,
    NEW_FILES_BYTES_MAX, SandboxSpec,
};
pub use time_limit::{OnTimeout, TimeLimit, TimeLimitChange, UnknownOnTimeout};
pub use volume::{InvalidMount, MountPath, VOLUMES_MAX};
