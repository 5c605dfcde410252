//! `bhatti setup`: builds what is missing, one artefact after the other.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::{disk, durable};
use bhatti_types::ImageName;

use crate::apt::Package;
use crate::certificates::{self, CertificateError, Certificates};
use crate::kernel::{self, KernelError};
use crate::rootfs::{self, RootfsError};
use crate::store::{Artefact, BUILD_PREFIX, ImageStore, Index, StoreError, file_error};
use crate::{DEFAULT_IMAGE, DEV_IMAGE, content_hash, modules};

/// What a build needs at its fullest: packages, their tree, its tar and the image, in bytes.
const BUILD_BYTES: u64 = 2 << 30;
/// The same for the kernel alone.
const KERNEL_BUILD_BYTES: u64 = 400 << 20;

/// How the source of a kernel from a package begins.
const PACKAGE_SOURCE: &str = "package ";

/// Where the kernel comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// Debian's package for virtual machines.
    Debian,
    /// A file: ELF or bzImage.
    File {
        /// The kernel.
        image: PathBuf,
        /// Its modules, as in `/lib/modules/<release>`; none if the kernel has all it needs built in.
        modules: Option<PathBuf>,
    },
}

/// What to set up.
#[derive(Clone, Debug)]
pub struct SetupOptions {
    /// The kernel.
    pub kernel: KernelSource,
    /// The guest agent's program.
    pub lohar: PathBuf,
    /// Whether the image with tools for development is built, too.
    pub dev: bool,
    /// Files of certificate authorities in PEM that images trust from now on, beyond those that they trust already.
    pub ca_certificates: Vec<PathBuf>,
}

/// Hears how far a setup is.
pub trait Progress: Send {
    /// A step begins.
    fn begin(&mut self, step: &str);
    /// The step goes on; for a person who waits.
    fn detail(&mut self, line: &str);
    /// The step has ended: what was made, or that there was nothing to do.
    fn end(&mut self, outcome: &str);
}

/// A setup failed. What it had finished stays.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is too little room.
    #[error(
        "`{}` has {} MiB free; building the {what} takes {} MiB. Free some, or choose another place with --data-dir",
        directory.display(), free_bytes >> 20, needed_bytes >> 20
    )]
    DiskFull {
        /// What was to be built.
        what: &'static str,
        /// Where.
        directory: PathBuf,
        /// The room that is there.
        free_bytes: u64,
        /// The room that it takes.
        needed_bytes: u64,
    },
    /// The kernel could not be made.
    #[error("failed to build the kernel")]
    Kernel(#[source] KernelError),
    /// The root file system could not be made.
    #[error("failed to build the root file system")]
    Rootfs(#[source] RootfsError),
    /// The certificates to trust could not be used.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// No package of Debian's is called so.
    #[error("`{0}` is no name of a Debian package")]
    PackageName(String),
    /// There is an image of that name, made of something else.
    #[error("image `{0}` already exists, and is made of something else")]
    NameTaken(ImageName),
}

/// Builds everything that a sandbox boots from and that is not there yet.
///
/// # Errors
///
/// Returns the step that failed. Nothing half-made is left in place, and what earlier steps made stays.
///
/// # Cancel safety
///
/// Dropping the future is as killing the process: the next setup cleans up and goes on.
pub async fn set_up(
    store: &ImageStore,
    options: &SetupOptions,
    progress: &mut dyn Progress,
) -> Result<(), SetupError> {
    let _lock = store.lock()?;
    let mut index = store.read_index()?;
    certificates::add(store, &options.ca_certificates)?;
    set_up_kernel(store, &mut index, &options.kernel, progress).await?;
    build_rootfs(store, &mut index, DEFAULT_IMAGE, &[], progress).await?;
    let packages = rootfs::DEV_PACKAGES.map(str::to_owned);
    if options.dev || is_outdated_dev(store, &index, &packages)? {
        let name = DEV_IMAGE.parse().map_err(|_| SetupError::PackageName(DEV_IMAGE.into()))?;
        check_name(store, &index, &name, &packages)?;
        build_rootfs(store, &mut index, DEV_IMAGE, &packages, progress).await?;
    }
    for name in index.images.keys() {
        if trusts_others(store, &index, name)? {
            progress.begin(&format!("image `{name}`"));
            progress.end(&format!(
                "trusts other authorities than new images do: run `bhatti image build {name} --package …` with its packages"
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

    let build = Build::start(store, "kernel", KERNEL_BUILD_BYTES)?;
    let made = build.path().join("made");
    fs::create_dir(&made).map_err(file_error("create", &made))?;
    progress.detail(&source_text);
    match making {
        KernelFrom::File { image, modules } => kernel::from_file(image, modules, &made),
        KernelFrom::Package(package) => kernel::from_package(&package, build.path(), &made).await,
    }
    .map_err(SetupError::Kernel)?;
    let name = format!("kernel-{}", hash_tree(&made)?);
    let artefact = build.finish(store, &made, name, source_text)?;
    progress.end(&artefact.name);
    index.kernel = Some(artefact);
    Ok(store.write_index(index)?)
}

/// What is to be done about the kernel.
enum KernelPlan<'a> {
    /// Nothing: this one is there.
    Keep(String),
    /// It is made.
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
            // One of Debian's stays, however old: a newer one is fetched when this one is removed.
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

/// Builds an image: the usual one with further packages of Debian's. One that was made so already stays.
///
/// # Errors
///
/// Returns the step that failed; the images are then what they were.
///
/// # Cancel safety
///
/// Dropping the future is as killing the process: the next build cleans up.
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
    check_name(store, &index, name, packages)?;
    build_rootfs(store, &mut index, name.as_str(), packages, progress).await
}

/// Whether an image of Debian's packages trusts other certificates than one would that was made now.
fn trusts_others(store: &ImageStore, index: &Index, name: &str) -> Result<bool, SetupError> {
    let Some(image) = index.images.get(name) else { return Ok(false) };
    let now = Certificates::of(store)?.recipe()?;
    Ok(rootfs::is_recipe(&image.source) && certificates::part_of(&image.source) != now)
}

/// Whether the image `dev` is this version's, but for the certificates that it trusts.
fn is_outdated_dev(
    store: &ImageStore,
    index: &Index,
    packages: &[String],
) -> Result<bool, SetupError> {
    let Some(image) = index.images.get(DEV_IMAGE) else { return Ok(false) };
    let recipe = rootfs::recipe(packages, &Certificates::of(store)?)?;
    Ok(image.source != recipe && is_same_but_for_certificates(&image.source, &recipe))
}

fn is_same_but_for_certificates(one: &str, other: &str) -> bool {
    certificates::without(one) == certificates::without(other)
}

/// Refuses the name of an image that is made of something else than these packages.
fn check_name(
    store: &ImageStore,
    index: &Index,
    name: &ImageName,
    packages: &[String],
) -> Result<(), SetupError> {
    let recipe = rootfs::recipe(packages, &Certificates::of(store)?)?;
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
    packages: &[String],
    progress: &mut dyn Progress,
) -> Result<(), SetupError> {
    progress.begin(&format!("image `{image_name}`"));
    let certificates = Certificates::of(store)?;
    let recipe = rootfs::recipe(packages, &certificates)?;
    if let Some(current) = store.current(index.images.get(image_name), &recipe) {
        progress.end(&format!("{} (already there)", current.name));
        return Ok(());
    }
    let build = Build::start(store, "image", BUILD_BYTES)?;
    let mut detail = |line: &str| progress.detail(line);
    let image = rootfs::build_debian(build.path(), packages, &certificates, &mut detail)
        .await
        .map_err(SetupError::Rootfs)?;
    let artefact = finish_image(build, store, image_name, &image, recipe)?;
    progress.end(&artefact.name);
    index.images.insert(image_name.to_owned(), artefact);
    Ok(store.write_index(index)?)
}

/// Puts a root file system in place.
pub(crate) fn finish_image(
    build: Build,
    store: &ImageStore,
    name: &str,
    image: &Path,
    source: String,
) -> Result<Artefact, StoreError> {
    let file = format!("rootfs-{name}-{}.ext4", hash_file(image)?);
    build.finish(store, image, file, source)
}

/// A build's own directory, removed with it.
pub(crate) struct Build(tempfile::TempDir);

impl Build {
    pub(crate) fn start(
        store: &ImageStore,
        what: &'static str,
        needed_bytes: u64,
    ) -> Result<Self, SetupError> {
        let directory = store.directory();
        let free_bytes = disk::free_bytes(directory)
            .map_err(file_error("ask for the free space of", directory))?;
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

    /// Puts what was made in place, under its name.
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
