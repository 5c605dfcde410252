//! The wire types of the HTTP API.
//!
//! Requests with unknown fields are refused: every field has an effect. Responses may gain
//! fields; clients ignore fields that they do not know.

mod error;
mod event;
mod exec;
mod file;
mod health;
mod image;
mod key;
mod port;
mod sandbox;
mod secret;
mod snapshot;
mod template;
mod usage;
mod user;
mod volume;
mod words;

pub use error::{ErrorBody, ErrorCode};
pub use event::Event;
pub use exec::{
    ExecEvent, ExecRequest, ExecResult, Job, Output, STDIN_WINDOW_BYTES, Session, ShellRequest,
    ShellServerMessage, StreamRequest, StreamServerMessage, TIMED_OUT, channel,
};
pub use file::{
    ARCHIVE_OUTCOME, ArchiveOutcome, Done, FileChange, FileChangeKind, FileEntry, MakeDirectory,
    RenameFile, Unpacked,
};
pub use health::Health;
pub use image::{
    BuildForm, BuildImage, CONTENT_BYTES_MAX as IMAGE_BYTES_MAX, Image, ImageSettings,
    LayerProgress, Operation, OperationError, PrunedImages, PullImage, PushImage, RegistryLogin,
    SaveImage, SetRegistryLogin, StoredLogin, TagImage,
};
pub use key::{ApiKey, CreateKey, CreatedKey, KeyScope};
pub use port::{Port, Publication, PublishPort};
pub use sandbox::{
    CreateSandbox, Deleted, ForkSandbox, Forks, Isolation, NewFile, Sandbox, StartSandbox,
    UpdateSandbox,
};
pub use secret::{Secret, SetSecret};
pub use snapshot::{CreateSnapshot, ResumeSnapshot, Snapshot};
pub use template::{
    BuildTemplate, BuildTemplateForm, CopyFiles, CreateTemplate, Template, TemplateStep,
};
pub use usage::Usage;
pub use user::{CreateUser, CreatedUser, Limits, Ticket, UpdateUser, User};
pub use volume::{
    AttachVolume, AttachedVolume, CloneVolume, CreateVolume, NewVolume, ResizeVolume, Volume,
    VolumeUser,
};
pub use words::{
    AcceleratorName, EngineName, ImageOwner, NetworkName, OnTimeoutName, OperationKind,
    OperationStatus, PullPolicy, SandboxStatus, SnapshotKind, ThermalState,
};
