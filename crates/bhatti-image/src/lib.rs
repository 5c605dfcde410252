//! Builds and stores the files that a VM boots from.
//!
//! ```text
//!  <data dir>/images/
//!    index.json                         names → artifacts; replaced atomically
//!    kernel-<hash>/vmlinux              and the modules that the guest needs
//!    initramfs-<hash>.cpio              lohar and those modules
//!    rootfs-<name>-<hash>.ext4          of an image that was built on this host
//!    rootfs-oci<version>-<hash>.ext4    of a user's image, named by its configuration
//!    rootfs-tar<version>-<hash>.ext4    of a user's image, named by its content
//!    .build-<random>/                   work in progress; removed by the next build
//! ```
//!
//! Artifacts are named by their content and never written again. A build works in its own
//! directory and renames each artifact when it is finished. So an interrupted build leaves
//! nothing half-made in place, and the next build continues after the last finished artifact.

mod apt;
mod archive;
mod certificates;
mod config;
mod content_hash;
mod ext4;
mod import;
mod import_error;
mod initramfs;
mod kernel;
mod layer;
mod layered;
mod modules;
mod rootfs;
mod setup;
mod store;
mod tool;
mod unpack;

pub use apt::AptError;
pub use archive::LayerFile;
pub use certificates::CertificateError;
pub use config::{ConfigError, Configuration};
pub use ext4::Ext4Error;
pub use import::{Imported, RemoveError};
pub use import_error::ImportError;
pub use initramfs::InitramfsError;
pub use kernel::KernelError;
pub use layered::LayeredBuild;
pub use modules::ModuleError;
pub use rootfs::RootfsError;
pub use setup::{KernelSource, Progress, SetupError, SetupOptions, build_image, set_up};
pub use store::{
    BootFiles, ImageStore, ImageSummary, KernelFiles, MissingImages, RootFile, StoreError,
};
pub use tool::ToolError;
pub use unpack::{COMMAND as TASK_COMMAND, UnpackError, run_task};

pub use bhatti_types::{BUILDER_IMAGE, DEFAULT_IMAGE};

/// The image with tools for development, which `bhatti setup --dev` builds.
pub const DEV_IMAGE: &str = "dev";

/// The image with Jupyter's kernels.
pub const INTERPRETER_IMAGE: &str = "code-interpreter";
