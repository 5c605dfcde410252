//! Errors of creations, and of the virtual machines, volumes and networks that sandboxes get.

use bhatti_api::ErrorCode;
use bhatti_control::{CreateError, NetworkError, SecretError, VolumeOpError};
use bhatti_engine::{BootError, RestoreError};
use bhatti_node::{BaseError, VolumeFileError, VolumeUseError};
use bhatti_store::{AttachError, NetworkAssignError, VolumeError};
use bhatti_types::Report;

use super::{ApiError, busy_guest};

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        let error = match error {
            CreateError::Image(image) => return image.into(),
            CreateError::Command(command) => return command.into(),
            CreateError::Use(used) => return used.into(),
            CreateError::Start(call) => return call.into(),
            error => error,
        };
        match &error {
            CreateError::NameTaken(name) => Self::new(ErrorCode::NameTaken, error.to_string())
                .hint(format!(
                    "choose another name, or destroy the sandbox: bhatti destroy {name}"
                )),
            CreateError::Quota(quota) => quota.clone().into(),
            CreateError::Secret(SecretError::NotFound(_)) => {
                Self::new(ErrorCode::BadRequest, error.to_string())
                    .hint("set the secret first: bhatti secret set NAME")
            }
            CreateError::Attach(attach) => attach_error(attach),
            CreateError::Network(network) => network_error(network),
            CreateError::TooMuchEnvironment
            | CreateError::Name(_)
            | CreateError::FilePath(_)
            | CreateError::Fixed(_)
            | CreateError::Volumes(_) => Self::new(ErrorCode::BadRequest, error.to_string()),
            CreateError::FilesTooLarge { .. } => {
                Self::new(ErrorCode::BodyTooLarge, error.to_string())
            }
            CreateError::NoSnapshot => Self::new(ErrorCode::SnapshotUnusable, error.to_string())
                .hint("build the template again: bhatti template build"),
            CreateError::Node(node) => node_error(node),
            CreateError::Secret(_)
            | CreateError::Image(_)
            | CreateError::Command(_)
            | CreateError::Use(_)
            | CreateError::Start(_)
            | CreateError::Entropy(_)
            | CreateError::Interrupted => Self::internal(&error),
            CreateError::Store(store) => Self::internal(store),
        }
    }
}

/// The answer to a creation that the node could not carry out.
fn node_error(error: &bhatti_node::CreateError) -> ApiError {
    use bhatti_node::CreateError;
    match error {
        CreateError::Images(bhatti_image::StoreError::Missing(missing)) => {
            ApiError::new(ErrorCode::NotSetUp, missing.to_string()).hint("run `bhatti setup`")
        }
        CreateError::Busy(busy) | CreateError::Base(BaseError::Busy(busy)) => (*busy).into(),
        CreateError::VolumeUse(volume) => volume_error(volume),
        CreateError::Network(network) => node_network_error(network),
        CreateError::Mount(_)
        | CreateError::Files(_)
        | CreateError::DiskTooSmall { .. }
        | CreateError::TooMuch { .. } => ApiError::new(ErrorCode::BadRequest, error.to_string()),
        CreateError::Base(BaseError::Boot(boot)) => boot_error(boot, error),
        CreateError::Boot(boot) => boot_error(boot, error),
        CreateError::Restore(restore) => restore_error(restore),
        CreateError::Unconfigured(_) => busy_guest(error),
        CreateError::Base(_)
        | CreateError::Vmm(_)
        | CreateError::Report(_)
        | CreateError::Images(_)
        | CreateError::Entropy(_)
        | CreateError::Interrupted => ApiError::internal(error),
        CreateError::Store(store) => ApiError::internal(store),
    }
}

pub(super) fn boot_error(boot: &BootError, whole: &(dyn std::error::Error + 'static)) -> ApiError {
    match boot {
        BootError::NotInstalled { .. } => {
            ApiError::new(ErrorCode::NotSetUp, Report(whole).to_string())
                .hint("run `bhatti doctor` to see how to install it")
        }
        // The guest's console output contains no path of this host.
        BootError::Ended { .. } | BootError::TimedOut { .. } => {
            tracing::warn!(error = %boot, "Sandbox did not boot");
            ApiError::new(ErrorCode::BootFailed, boot.to_string())
        }
        BootError::NoDisk => ApiError::new(ErrorCode::BootFailed, boot.to_string())
            .hint("destroy the sandbox and create another: bhatti destroy NAME"),
        BootError::NoDiskSize(_) => ApiError::new(ErrorCode::BadRequest, boot.to_string()).hint(
            "leave out the disk size; Docker supports it only on XFS with project quotas, btrfs and ZFS",
        ),
        BootError::Prepare { .. } => ApiError::internal(whole),
    }
}

pub(super) fn attach_error(error: &AttachError) -> ApiError {
    match error {
        AttachError::NotFound(name) => ApiError::new(ErrorCode::BadRequest, error.to_string())
            .hint(format!("create the volume first: bhatti volume create {name}")),
        AttachError::InUse { sandbox, .. } => ApiError::new(ErrorCode::WrongState, error.to_string())
            .hint(format!("attach the volume read-only in all sandboxes, or destroy `{sandbox}`: a volume has one writer or any number of readers")),
        AttachError::Busy(_) => {
            ApiError::new(ErrorCode::WrongState, error.to_string()).hint("try again in a moment")
        }
        AttachError::Quota(quota) => quota.clone().into(),
        AttachError::Store(store) => ApiError::internal(store),
    }
}

pub(super) fn volume_error(error: &VolumeUseError) -> ApiError {
    match error {
        VolumeUseError::File { source: VolumeFileError::Damaged { .. }, .. } => {
            ApiError::new(ErrorCode::WrongState, Report(error).to_string())
                .hint("ask the admin to repair the volume with an interactive e2fsck")
        }
        VolumeUseError::File { source: VolumeFileError::Slow, .. } => {
            ApiError::new(ErrorCode::WrongState, Report(error).to_string()).hint("try again later")
        }
        VolumeUseError::Missing(_) | VolumeUseError::File { .. } => ApiError::internal(error),
    }
}

impl From<VolumeOpError> for ApiError {
    fn from(error: VolumeOpError) -> Self {
        match error {
            VolumeOpError::NotFound(_) => Self::new(ErrorCode::NotFound, error.to_string())
                .hint("list them: bhatti volume list"),
            VolumeOpError::Refused(VolumeError::NameTaken(_)) => {
                Self::new(ErrorCode::NameTaken, error.to_string()).hint("choose another name")
            }
            VolumeOpError::Refused(VolumeError::InUse { .. }) => {
                Self::new(ErrorCode::WrongState, error.to_string())
                    .hint("destroy the sandboxes first")
            }
            VolumeOpError::Refused(VolumeError::Busy(_)) => {
                Self::new(ErrorCode::WrongState, error.to_string()).hint("try again in a moment")
            }
            VolumeOpError::Refused(VolumeError::Shrinks { .. }) => {
                Self::new(ErrorCode::BadRequest, error.to_string())
            }
            VolumeOpError::Refused(VolumeError::Quota(quota)) => quota.into(),
            VolumeOpError::Refused(VolumeError::Store(error)) => error.into(),
            VolumeOpError::File(VolumeFileError::Damaged { .. }) => {
                Self::new(ErrorCode::WrongState, error.to_string())
                    .hint("ask the admin to repair the volume with an interactive e2fsck")
            }
            VolumeOpError::File(VolumeFileError::Slow) => {
                Self::new(ErrorCode::WrongState, error.to_string()).hint("try again later")
            }
            VolumeOpError::File(_)
            | VolumeOpError::Directory { .. }
            | VolumeOpError::Entropy(_)
            | VolumeOpError::Interrupted => Self::internal(&error),
        }
    }
}

pub(super) fn network_error(error: &NetworkError) -> ApiError {
    match error {
        NetworkError::NotAllowable(_) => ApiError::new(ErrorCode::Forbidden, error.to_string())
            .hint("ask the admin to add the range to network_allowable in the configuration"),
        NetworkError::NothingToAllow => ApiError::new(ErrorCode::BadRequest, error.to_string()),
        NetworkError::Node(error) => node_network_error(error),
    }
}

pub(super) fn node_network_error(error: &bhatti_node::NetworkError) -> ApiError {
    use bhatti_node::NetworkError;
    match error {
        NetworkError::Unavailable(_) => ApiError::new(ErrorCode::NotSetUp, error.to_string())
            .hint("run `bhatti doctor` to see what is missing, or create the sandbox without a network: --network none"),
        NetworkError::InTheWay(_) => ApiError::new(ErrorCode::NotSetUp, error.to_string())
            .hint("release the resource that the other program uses, or create the sandbox without a network: --network none"),
        NetworkError::Assign(NetworkAssignError::Exhausted { .. }) => {
            ApiError::new(ErrorCode::Busy, error.to_string())
        }
        NetworkError::Assign(NetworkAssignError::Store(store)) | NetworkError::Store(store) => {
            ApiError::internal(store)
        }
        NetworkError::Host(_) => ApiError::internal(error),
    }
}

pub(super) fn restore_error(error: &RestoreError) -> ApiError {
    match error {
        RestoreError::Damaged { .. } | RestoreError::Mismatch { .. } | RestoreError::Stale => {
            tracing::warn!(error = %Report(error), "Snapshot cannot be used");
            ApiError::new(ErrorCode::SnapshotUnusable, error.to_string()).hint(
                "boot the sandbox from its disk, without its memory: bhatti start --cold-boot NAME",
            )
        }
        RestoreError::Unsupported(_) | RestoreError::Vmm { .. } | RestoreError::File { .. } => {
            ApiError::internal(error)
        }
    }
}
