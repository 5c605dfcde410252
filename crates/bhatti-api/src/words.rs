//! The words that some fields hold, for the API's description and the clients made from it.
//!
//! The fields are text: an older client accepts a word that a newer daemon adds.

use utoipa::ToSchema;

/// State of a sandbox.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum SandboxStatus {
    /// It is being created.
    Creating,
    /// It runs, or is paused or saved until it is used again.
    Running,
    /// It was stopped.
    Stopped,
    /// It was lost.
    Failed,
    /// It was destroyed.
    Destroyed,
}

/// Activity of a running sandbox.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum ThermalState {
    /// Its processors run.
    Hot,
    /// It is paused.
    Warm,
    /// It is saved, without a process on the host.
    Cold,
}

/// How a sandbox is connected.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum NetworkName {
    /// To its owner's sandboxes and the Internet.
    Nat,
    /// Not at all.
    None,
}

/// What happens to a sandbox when its time is over.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum OnTimeoutName {
    /// It is destroyed.
    Destroy,
    /// It is stopped, and its limit removed.
    Stop,
}

/// What runs the sandboxes.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum EngineName {
    /// QEMU's microvm.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// Docker.
    Docker,
}

/// What executes a guest's instructions.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum AcceleratorName {
    /// The processor's virtualization.
    Kvm,
    /// Software emulation.
    Tcg,
    /// Nothing: containers share the host's kernel.
    None,
}

/// The memory that a snapshot contains.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// All of it.
    Full,
    /// The pages that differ from a base, which is kept with the snapshot.
    Diff,
}

/// Whose an image is.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum ImageOwner {
    /// The caller's.
    Me,
    /// The admin's, or that of a user who shares it.
    Other,
    /// No user's: it was built on the host.
    Host,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum OperationKind {
    /// It pulls an image.
    Pull,
    /// It pushes an image.
    Push,
    /// It saves a sandbox as an image.
    Save,
    /// It builds an image from a Dockerfile.
    Build,
    /// It builds a template from steps.
    Template,
}

/// State of an operation.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum OperationStatus {
    /// It runs.
    Running,
    /// It succeeded.
    Done,
    /// It failed.
    Failed,
    /// It was canceled.
    Canceled,
}

/// When the image of a new sandbox is pulled.
#[derive(Clone, Copy, Debug, ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum PullPolicy {
    /// If there is no image of that name.
    Missing,
    /// In any case.
    Always,
    /// Never.
    Never,
}
