//! Errors of images: of registries, archives and owners.

use bhatti_api::ErrorCode;
use bhatti_control::{
    BuildError, CreateError, ImageCommandError, ImageError, LoginError, OperationFailure,
    PullFailure, SaveError, SnapshotOpError, TemplateBuildError, VolumeOpError,
};
use bhatti_node::{ImageFilesError, ImportError, PullError, RegistryError, RemoveError};
use bhatti_store::{TemplateInsertError, VolumeError};
use bhatti_types::Report;

use super::ApiError;

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        let text = error.to_string();
        match error {
            ImageError::NotFound(_) => {
                Self::new(ErrorCode::NotFound, text).hint("list the images: bhatti image list")
            }
            ImageError::NotSetUp => Self::new(ErrorCode::NotSetUp, text).hint("run `bhatti setup`"),
            ImageError::NotOwned(_) => Self::new(ErrorCode::Forbidden, text),
            ImageError::InUse { .. } => {
                Self::new(ErrorCode::WrongState, text).hint("destroy or delete that first")
            }
            ImageError::NameTaken(_) => {
                Self::new(ErrorCode::NameTaken, text).hint("choose another name")
            }
            ImageError::Sandbox(error) => error.into(),
            ImageError::Share(_) => Self::new(ErrorCode::NotFound, text),
            ImageError::Canceled(_) => Self::new(ErrorCode::PullFailed, text),
            ImageError::Pull(error) => pull_failure(&error),
            ImageError::NoRoom(_) => no_room(text),
            ImageError::Dockerfile(_) => Self::new(ErrorCode::BadRequest, text),
            ImageError::NoBuilder => Self::new(ErrorCode::NotSetUp, text)
                .hint("run `bhatti setup --builder` on the daemon's machine"),
            ImageError::NoLayers(_) => Self::new(ErrorCode::WrongState, text)
                .hint("only images that were pulled, imported or saved can be exported"),
            ImageError::Import(error) => error.into(),
            ImageError::Remove(error) => error.into(),
            ImageError::Files(ImageFilesError::Missing(missing)) => {
                Self::new(ErrorCode::NotSetUp, missing.to_string()).hint("run `bhatti setup`")
            }
            ImageError::Quota(quota) => quota.into(),
            ImageError::Store(error) => error.into(),
            error @ (ImageError::Files(_)
            | ImageError::Layers(_)
            | ImageError::Collect(_)
            | ImageError::FreeSpace(_)
            | ImageError::Entropy(_)) => Self::internal(&error),
        }
    }
}

impl From<ImageCommandError> for ApiError {
    fn from(error: ImageCommandError) -> Self {
        match error {
            ImageCommandError::None(_) => {
                Self::new(ErrorCode::BadRequest, error.to_string()).hint("name the command to run")
            }
            ImageCommandError::Sandbox(error) => error.into(),
        }
    }
}

/// Returns the error of an operation.
pub(crate) fn operation_failure(error: &OperationFailure) -> ApiError {
    match error {
        OperationFailure::Pull(error) => pull_failure(error),
        OperationFailure::Save(error) => save_error(error),
        OperationFailure::Build(error) => build_error(error),
        OperationFailure::Template(error) => template_error(error),
        OperationFailure::Quota(quota) => quota.clone().into(),
    }
}

fn pull_failure(error: &PullFailure) -> ApiError {
    let failed = |code| ApiError::new(code, error.to_string());
    match error {
        // No registry can have an image of that name.
        PullFailure::Reference(_) | PullFailure::Name(_) => failed(ErrorCode::NotFound),
        PullFailure::NoRoom(complaint) => no_room(complaint.clone()),
        PullFailure::Quota(quota) => quota.clone().into(),
        PullFailure::Store(error) => ApiError::internal(error),
        PullFailure::Pull { error: cause, .. } | PullFailure::Push { error: cause, .. } => {
            let refused = pull_error(cause);
            ApiError { message: format!("{error}: {}", refused.message), ..refused }
        }
    }
}

fn save_error(error: &SaveError) -> ApiError {
    match error {
        // Operations share their errors, which have no copies.
        SaveError::Use(_) => ApiError::new(ErrorCode::WrongState, error.to_string()),
        SaveError::Read(_) => ApiError::new(ErrorCode::ConnectionLost, Report(error).to_string()),
        SaveError::Write(_) => ApiError::internal(error),
        SaveError::TooLarge(_) => no_room(error.to_string()),
        SaveError::Image(image) => of_made(image),
    }
}

/// Returns the error of an image that was made from a sandbox.
fn of_made(error: &ImageError) -> ApiError {
    match error {
        ImageError::NoRoom(complaint) => no_room(complaint.clone()),
        ImageError::Quota(quota) => quota.clone().into(),
        ImageError::NameTaken(_) => ApiError::new(ErrorCode::NameTaken, error.to_string()),
        ImageError::Import(import) if import.is_disk_full() => disk_full(),
        ImageError::Pull(error) => pull_failure(error),
        ImageError::NotFound(_) => ApiError::new(ErrorCode::NotFound, error.to_string()),
        ImageError::NoLayers(_) => ApiError::new(ErrorCode::BadRequest, error.to_string())
            .hint("begin with an image of a registry, or with one that was imported or saved"),
        ImageError::Canceled(_) => ApiError::new(ErrorCode::PullFailed, error.to_string()),
        _ => ApiError::internal(error),
    }
}

impl From<OperationFailure> for ApiError {
    fn from(error: OperationFailure) -> Self {
        operation_failure(&error)
    }
}

impl From<LoginError> for ApiError {
    fn from(error: LoginError) -> Self {
        match &error {
            LoginError::Registry(_) | LoginError::Length => {
                Self::new(ErrorCode::BadRequest, error.to_string())
            }
            LoginError::NotFound(_) => Self::new(ErrorCode::NotFound, error.to_string())
                .hint("list the logins: bhatti image logins"),
            LoginError::Refused {
                error: PullError::Registry(RegistryError::Denied { .. }),
                ..
            } => Self::new(
                ErrorCode::Forbidden,
                format!("{error}: the registry refuses the name or the password"),
            ),
            LoginError::Refused { error: cause, .. } => {
                let refused = pull_error(cause);
                Self { message: format!("{error}: {}", refused.message), hint: None, ..refused }
            }
            LoginError::Quota(quota) => quota.clone().into(),
            LoginError::Seal(_) | LoginError::Unseal { .. } | LoginError::Store(_) => {
                Self::internal(&error)
            }
        }
    }
}

fn template_error(error: &TemplateBuildError) -> ApiError {
    let failed = |code| ApiError::new(code, Report(error).to_string());
    match error {
        TemplateBuildError::CannotSave => failed(ErrorCode::Unsupported),
        TemplateBuildError::TooMany(_)
        | TemplateBuildError::Step(_)
        | TemplateBuildError::Command
        | TemplateBuildError::Environment(_)
        | TemplateBuildError::NoFiles
        | TemplateBuildError::Path(_)
        | TemplateBuildError::Target(_)
        | TemplateBuildError::Missing(_)
        | TemplateBuildError::Archive(_) => failed(ErrorCode::BadRequest),
        TemplateBuildError::Failed { .. }
        | TemplateBuildError::Ended(_)
        | TemplateBuildError::NotReady(_) => {
            failed(ErrorCode::BuildFailed).hint("the output is in the build's log")
        }
        TemplateBuildError::Create(create) => creation_error(create),
        TemplateBuildError::Save(SnapshotOpError::Quota(quota))
        | TemplateBuildError::Keep(TemplateInsertError::Quota(quota)) => quota.clone().into(),
        TemplateBuildError::Guest(_) => failed(ErrorCode::ConnectionLost),
        TemplateBuildError::Use(used) => ApiError::new(ErrorCode::WrongState, used.to_string()),
        TemplateBuildError::Save(saved) => ApiError::new(ErrorCode::WrongState, saved.to_string()),
        TemplateBuildError::Keep(_)
        | TemplateBuildError::Write(_)
        | TemplateBuildError::Store(_) => ApiError::internal(error),
    }
}

/// Returns the error of a build whose sandbox was not created. Operations share their errors, which
/// have no copies.
fn creation_error(error: &CreateError) -> ApiError {
    let refused = |code| ApiError::new(code, error.to_string());
    match error {
        CreateError::Image(image) => of_made(image),
        CreateError::Quota(quota) => quota.clone().into(),
        CreateError::Node(bhatti_node::CreateError::Busy(busy)) => (*busy).into(),
        CreateError::Fixed(_) | CreateError::Network(_) | CreateError::Volumes(_) => {
            refused(ErrorCode::BadRequest)
        }
        CreateError::NoSnapshot => refused(ErrorCode::SnapshotUnusable),
        CreateError::NameTaken(_) | CreateError::Attach(_) | CreateError::Use(_) => {
            refused(ErrorCode::WrongState)
        }
        _ => ApiError::internal(error),
    }
}

fn build_error(error: &BuildError) -> ApiError {
    let failed = |code| ApiError::new(code, Report(error).to_string());
    match error {
        BuildError::Step { .. } => {
            failed(ErrorCode::BuildFailed).hint("the output of the step is in the build's log")
        }
        BuildError::Builder(_) => failed(ErrorCode::BuildFailed),
        BuildError::TooLarge(_) => no_room(error.to_string()),
        BuildError::Image(image) => of_made(image),
        BuildError::Guest(_) => failed(ErrorCode::ConnectionLost),
        BuildError::Write(_) => ApiError::internal(error),
        BuildError::Create(create) => creation_error(create),
        BuildError::Cache(VolumeOpError::Refused(VolumeError::Quota(quota))) => {
            quota.clone().into()
        }
        BuildError::Cache(VolumeOpError::Refused(refused)) => {
            ApiError::new(ErrorCode::WrongState, refused.to_string())
        }
        BuildError::Cache(_) => ApiError::internal(error),
        BuildError::Use(used) => ApiError::new(ErrorCode::WrongState, used.to_string()),
    }
}

fn pull_error(error: &PullError) -> ApiError {
    // Errors of connections name their cause themselves.
    let failed = |code| ApiError::new(code, error.to_string());
    match error {
        PullError::Registry(RegistryError::NotFound(_)) => {
            failed(ErrorCode::NotFound).hint("list the images of this host: bhatti image list")
        }
        PullError::Registry(RegistryError::Denied { .. }) => {
            failed(ErrorCode::NotFound).hint("log in first: bhatti image login REGISTRY")
        }
        PullError::Registry(RegistryError::Platform { .. } | RegistryError::Unsupported { .. })
        | PullError::Config(_)
        | PullError::Layers { .. } => failed(ErrorCode::BadRequest),
        PullError::Registry(RegistryError::File { .. })
        | PullError::Store(_)
        | PullError::Prepare(_)
        | PullError::Interrupted => ApiError::internal(error),
        PullError::Registry(_) => failed(ErrorCode::PullFailed)
            .hint("the images that are here already: bhatti image list"),
        PullError::OverQuota { .. } => no_room(error.to_string()),
        PullError::DiskFull { .. } => failed(ErrorCode::HostDiskFull)
            .hint("delete unneeded images, or ask the operator for disk space"),
        PullError::Build(error) if error.is_disk_full() => disk_full(),
        PullError::Build(error) => match error {
            ImportError::Host(_) | ImportError::File(_) | ImportError::Store(_) => {
                ApiError::internal(error)
            }
            _ => failed(ErrorCode::BadRequest),
        },
    }
}

impl From<ImportError> for ApiError {
    fn from(error: ImportError) -> Self {
        match &error {
            ImportError::Archive { .. } => Self::new(ErrorCode::BadRequest, error.to_string())
                .hint("send a tar of a root file system (`docker export`), of one image (`docker save`) or of an OCI layout, plain or compressed with gzip, xz or zstd"),
            ImportError::TooLarge(_) | ImportError::WrongLayer(_) | ImportError::Config(_) => {
                Self::new(ErrorCode::BadRequest, error.to_string())
            }
            error if error.is_disk_full() => disk_full(),
            ImportError::DiskFull { .. }
            | ImportError::Host(_)
            | ImportError::File(_)
            | ImportError::Store(_) => Self::internal(&error),
        }
    }
}

fn no_room(message: String) -> ApiError {
    ApiError::new(ErrorCode::QuotaExceeded, message)
        .hint("delete images, snapshots or sandboxes, or ask the admin for a higher limit")
}

fn disk_full() -> ApiError {
    ApiError::new(ErrorCode::Busy, "the disk of the daemon's host has no space for the image")
}

impl From<RemoveError> for ApiError {
    fn from(error: RemoveError) -> Self {
        match &error {
            RemoveError::NotFound(_) => Self::new(ErrorCode::NotFound, error.to_string()),
            RemoveError::IsDefault(_) => Self::new(ErrorCode::WrongState, error.to_string()),
            RemoveError::Interrupted | RemoveError::Store(_) => Self::internal(&error),
        }
    }
}
