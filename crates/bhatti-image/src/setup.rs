//! `bhatti setup`: builds missing artifacts, one after another.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::blocking;
use bhatti_host::{disk, durable};
use bhatti_types::ImageName;

use crate::apt::Package;
use crate::certificates::{self, CertificateError, Certificates};
use crate::kernel::{self, KernelError};
use crate::rootfs::{self, Debian, RootfsError};
use crate::store::{Artefact, BUILD_PREFIX, ImageStore, Index, StoreError, file_error};
use crate::{BUILDER_IMAGE, DEFAULT_IMAGE, DEV_IMAGE, INTERPRETER_IMAGE, content_hash, modules};

/// Disk space that a build needs at its peak, in bytes: packages, their tree, its tar and the
/// image.
const BUILD_BYTES: u64 = 2 << 30;
/// Disk space that the kernel's build needs, in bytes.
const KERNEL_BUILD_BYTES: u64 = 400 << 20;

/// Prefix of the source of a kernel from a package.
const PACKAGE_SOURCE: &str = "package ";

/// The source of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// Debian's package for virtual machines.
    Debian,
    /// A file: ELF or bzImage.
    File {
        /// The kernel.
        image: PathBuf,
        /// The kernel's modules, as in `/lib/modules/<release>`; `None` if the kernel has all
        /// modules that it needs built in.
        modules: Option<PathBuf>,
    },
}

/// Options of a setup.
#[derive(Clone, Debug)]
pub struct SetupOptions {
    /// The kernel.
    pub kernel: KernelSource,
    /// Path of the guest agent's program.
    pub lohar: PathBuf,
    /// Whether the image with development tools is built, too.
    pub dev: bool,
    /// Whether the image that builds others is built, too.
    pub builder: bool,
    /// Whether the image that runs code in Jupyter's kernels is built, too.
    pub interpreter: bool,
    /// PEM files of certificate authorities that images trust from now on, beyond those that they
    /// trust already.
    pub ca_certificates: Vec<PathBuf>,
}

/// Receives the progress of a setup.
pub trait Progress: Send {
    /// A step begins.
    fn begin(&mut self, step: &str);
    /// The step continues; `line` is for a user who waits.
    fn detail(&mut self, line: &str);
    /// The step has ended. `outcome` names the artifact, and says if it already existed.
    fn end(&mut self, outcome: &str);
}

/// A setup failed. Finished artifacts stay.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk has too little free space.
    #[error(
        "`{}` has {} MiB free; building the {what} takes {} MiB. Free some space, or choose another directory with --data-dir",
        directory.display(), free_bytes >> 20, needed_bytes >> 20
    )]
    DiskFull {
        /// The artifact to be built.
        what: &'static str,
        /// The directory of the build.
        directory: PathBuf,
        /// Free space, in bytes.
        free_bytes: u64,
        /// Space that the build needs, in bytes.
        needed_bytes: u64,
    },
    /// The kernel could not be built.
    #[error("failed to build the kernel")]
    Kernel(#[source] KernelError),
    /// The root file system could not be built.
    #[error("failed to build the root file system")]
    Rootfs(#[source] RootfsError),
    /// The certificates to trust could not be used.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// A name is not valid for a Debian package.
    #[error("`{0}` is not a valid name of a Debian package")]
    PackageName(String),
    /// An image of that name exists, with another recipe or an imported one.
    #[error("image `{0}` already exists, and was built from other sources")]
    NameTaken(ImageName),
}

/// Builds every missing artifact that a sandbox boots from.
///
/// # Errors
///
/// Returns the step that failed. Nothing half-made is left in place, and the artifacts of earlier
/// steps stay.
///
/// # Cancel safety
///
/// Dropping the future has the effect of killing the process: the next setup cleans up and
/// continues.
pub async fn set_up(
    store: &ImageStore,
    options: &SetupOptions,
    progress: &mut dyn Progress,
) -> Result<(), SetupError> {
    let _lock = store.lock()?;
    let mut index = store.read_index()?;
    blocking(|| certificates::add(store, &options.ca_certificates))?;
    set_up_kernel(store, &mut index, &options.kernel, progress).await?;
    build_rootfs(store, &mut index, DEFAULT_IMAGE, &Debian::with(&[]), progress).await?;
    let further = [
        (DEV_IMAGE, Debian::dev(), options.dev),
        (BUILDER_IMAGE, Debian::builder(), options.builder),
        (INTERPRETER_IMAGE, Debian::interpreter(), options.interpreter),
    ];
    for (image, debian, wanted) in further {
        if wanted || blocking(|| trusts_fewer(store, &index, image, &debian))? {
            let name = image.parse().map_err(|_| SetupError::PackageName(image.into()))?;
            blocking(|| check_name(store, &index, &name, &debian))?;
            build_rootfs(store, &mut index, image, &debian, progress).await?;
        }
    }
    for name in index.images.keys() {
        if blocking(|| trusts_others(store, &index, name))? {
            progress.begin(&format!("image `{name}`"));
            progress.end(&format!(
                "trusts other certificate authorities than new images; rebuild it: `bhatti image build -t {name} --package …` with its packages"
            ));
        }
    }
    progress.begin("initramfs");
    let files = store.boot_files(DEFAULT_IMAGE, &options.lohar)?;
    progress.end(&file_name(&files.initramfs));
    Ok(store.prune(&index, &files.initramfs)?)
}

async fn set_up_kernel(
    store: &ImageStore,
    index: &mut Index,
    source: &KernelSource,
    progress: &mut dyn Progress,
) -> Result<(), SetupError> {
    progress.begin("kernel");
    let plan = plan_kernel(store, index, source).await?;
    let (source_text, making) = match plan {
        KernelPlan::Keep(name) => {
            progress.end(&format!("{name} (already there)"));
            return Ok(());
        }
        KernelPlan::Make { source_text, from } => (source_text, from),
    };

    let build = blocking(|| Build::start(store, "kernel", KERNEL_BUILD_BYTES))?;
    let made = build.path().join("made");
    blocking(|| fs::create_dir(&made)).map_err(file_error("create", &made))?;
    progress.detail(&source_text);
    match making {
        KernelFrom::File { image, modules } => {
            blocking(|| kernel::from_file(image, modules, &made))
        }
        KernelFrom::Package(package) => kernel::from_package(&package, build.path(), &made).await,
    }
    .map_err(SetupError::Kernel)?;
    let name = format!("kernel-{}", hash_tree(&made)?);
    let artefact = build.finish(store, &made, name, source_text)?;
    progress.end(&artefact.name);
    index.kernel = Some(artefact);
    Ok(store.write_index(index)?)
}

/// The plan for the kernel.
enum KernelPlan<'a> {
    /// The existing kernel, named here, is kept.
    Keep(String),
    /// A kernel is built.
    Make { source_text: String, from: KernelFrom<'a> },
}

enum KernelFrom<'a> {
    Package(Package),
    File { image: &'a Path, modules: Option<&'a Path> },
}

async fn plan_kernel<'a>(
    store: &ImageStore,
    index: &Index,
    source: &'a KernelSource,
) -> Result<KernelPlan<'a>, SetupError> {
    let present = index
        .kernel
        .as_ref()
        .filter(|kernel| store.current(Some(kernel), &kernel.source).is_some());
    let (source_text, from) = match source {
        KernelSource::Debian => {
            // A Debian kernel stays, however old. To get a newer one, the operator removes it.
            let is_ours = |source: &str| {
                source.starts_with(PACKAGE_SOURCE) && source.ends_with(&modules::wanted())
            };
            if let Some(kernel) = present.filter(|kernel| is_ours(&kernel.source)) {
                return Ok(KernelPlan::Keep(kernel.name.clone()));
            }
            let package = kernel::debian_package().await.map_err(SetupError::Kernel)?;
            (
                format!(
                    "{PACKAGE_SOURCE}{} {}{}",
                    package.name,
                    package.version,
                    modules::wanted()
                ),
                KernelFrom::Package(package),
            )
        }
        KernelSource::File { image, modules } => {
            let modules = modules.as_deref();
            (describe_file(image, modules)?, KernelFrom::File { image, modules })
        }
    };
    Ok(match present.filter(|kernel| kernel.source == source_text) {
        Some(kernel) => KernelPlan::Keep(kernel.name.clone()),
        None => KernelPlan::Make { source_text, from },
    })
}

/// Builds an image: the default image with further Debian packages. Keeps an existing image with
/// the same recipe.
///
/// # Errors
///
/// Returns the step that failed. The images are then unchanged.
///
/// # Cancel safety
///
/// Dropping the future has the effect of killing the process: the next build cleans up.
pub async fn build_image(
    store: &ImageStore,
    name: &ImageName,
    packages: &[String],
    progress: &mut dyn Progress,
) -> Result<(), SetupError> {
    let is_package = |name: &&String| {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        name.bytes().next().is_some_and(plain)
            && name.bytes().all(|b| plain(b) || matches!(b, b'+' | b'-' | b'.'))
    };
    if let Some(odd) = packages.iter().find(|name| !is_package(name)) {
        return Err(SetupError::PackageName(odd.clone()));
    }
    let _lock = store.lock()?;
    let mut index = store.read_index()?;
    let debian = Debian::with(packages);
    blocking(|| check_name(store, &index, name, &debian))?;
    build_rootfs(store, &mut index, name.as_str(), &debian, progress).await
}

/// Whether an image of Debian packages trusts other certificates than a new image would.
fn trusts_others(store: &ImageStore, index: &Index, name: &str) -> Result<bool, SetupError> {
    let Some(image) = index.images.get(name) else { return Ok(false) };
    let now = blocking(|| Certificates::of(store))?.recipe()?;
    Ok(rootfs::is_recipe(&image.source) && certificates::part_of(&image.source) != now)
}

/// Whether an image's recipe differs from this version's only in the trusted certificates.
fn trusts_fewer(
    store: &ImageStore,
    index: &Index,
    image: &str,
    debian: &Debian,
) -> Result<bool, SetupError> {
    let Some(image) = index.images.get(image) else { return Ok(false) };
    let recipe = debian.recipe(&blocking(|| Certificates::of(store))?)?;
    Ok(image.source != recipe && is_same_but_for_certificates(&image.source, &recipe))
}

fn is_same_but_for_certificates(one: &str, other: &str) -> bool {
    certificates::without(one) == certificates::without(other)
}

/// Refuses the name of an existing image that was built from anything else.
fn check_name(
    store: &ImageStore,
    index: &Index,
    name: &ImageName,
    debian: &Debian,
) -> Result<(), SetupError> {
    let recipe = debian.recipe(&blocking(|| Certificates::of(store))?)?;
    let same = |image: &Artefact| is_same_but_for_certificates(&image.source, &recipe);
    if index.images.get(name.as_str()).is_none_or(same) {
        return Ok(());
    }
    Err(SetupError::NameTaken(name.clone()))
}

async fn build_rootfs(
    store: &ImageStore,
    index: &mut Index,
    image_name: &str,
    debian: &Debian,
    progress: &mut dyn Progress,
) -> Result<(), SetupError> {
    progress.begin(&format!("image `{image_name}`"));
    let certificates = blocking(|| Certificates::of(store))?;
    let recipe = debian.recipe(&certificates)?;
    if let Some(current) = store.current(index.images.get(image_name), &recipe) {
        progress.end(&format!("{} (already there)", current.name));
        return Ok(());
    }
    let build = blocking(|| Build::start(store, "image", BUILD_BYTES))?;
    let mut detail = |line: &str| progress.detail(line);
    let image =
        rootfs::build_debian(store.program(), build.path(), debian, &certificates, &mut detail)
            .await
            .map_err(SetupError::Rootfs)?;
    let artefact = finish_image(build, store, image_name, &image, recipe)?;
    progress.end(&artefact.name);
    index.images.insert(image_name.to_owned(), artefact);
    Ok(store.write_index(index)?)
}

/// Moves a root file system into the store.
pub(crate) fn finish_image(
    build: Build,
    store: &ImageStore,
    name: &str,
    image: &Path,
    source: String,
) -> Result<Artefact, StoreError> {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let name: String = name.chars().map(safe).take(63).collect();
    let file = format!("rootfs-{name}-{}.ext4", hash_file(image)?);
    build.finish(store, image, file, source)
}

/// The directory of a build, removed on drop.
pub(crate) struct Build(tempfile::TempDir);

impl Build {
    pub(crate) fn start(
        store: &ImageStore,
        what: &'static str,
        needed_bytes: u64,
    ) -> Result<Self, SetupError> {
        let directory = store.directory();
        let free_bytes =
            disk::free_bytes(directory).map_err(file_error("read the free space of", directory))?;
        if free_bytes < needed_bytes {
            return Err(SetupError::DiskFull {
                what,
                directory: directory.to_owned(),
                free_bytes,
                needed_bytes,
            });
        }
        let made = tempfile::Builder::new().prefix(BUILD_PREFIX).tempdir_in(directory);
        Ok(Self(made.map_err(file_error("create a directory in", directory))?))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Moves the built file or directory into the store, under its name.
    fn finish(
        self,
        store: &ImageStore,
        made: &Path,
        name: String,
        source: String,
    ) -> Result<Artefact, StoreError> {
        let place = store.directory().join(&name);
        if !place.exists() {
            sync_tree(made).map_err(file_error("write", made))?;
            durable::rename(made, &place).map_err(file_error("put in place", &place))?;
        }
        Ok(Artefact { name, source })
    }
}

fn sync_tree(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            sync_tree(&entry?.path())?;
        }
    }
    File::open(path)?.sync_all()
}

fn describe_file(image: &Path, modules: Option<&Path>) -> Result<String, SetupError> {
    let tree = modules.map_or_else(|| Ok("none".to_owned()), hash_tree)?;
    Ok(format!("file {} tree {tree}{}", hash_file(image)?, modules::wanted()))
}

fn hash_tree(path: &Path) -> Result<String, StoreError> {
    content_hash::of_tree(path).map_err(file_error("read", path))
}

fn hash_file(path: &Path) -> Result<String, StoreError> {
    content_hash::of_file(path).map_err(file_error("read", path))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
