//! The directory of artifacts and its index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bhatti_host::durable;
use bhatti_types::{ParseRootError, RootName};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::content_hash;
use crate::initramfs::{self, InitramfsError};

const INDEX: &str = "index.json";
pub(crate) const BUILD_PREFIX: &str = ".build-";

/// The artifacts of a data directory.
#[derive(Clone, Debug)]
pub struct ImageStore {
    directory: PathBuf,
    /// `bhatti`, which unpacks archives in a jailed process.
    program: PathBuf,
    /// The initramfs that was built last. Without this record, every creation would read, copy
    /// and hash 5 MB to find that the file exists.
    initramfs: Arc<Mutex<Option<Initramfs>>>,
}

/// An initramfs, and the files that it was built from.
#[derive(Clone, Debug)]
struct Initramfs {
    path: PathBuf,
    lohar: FileVersion,
    /// The kernel's directory, which is named by its content.
    kernel: PathBuf,
}

/// The version of a file. It changes when the file is written or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileVersion {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileVersion {
    fn of(path: &Path) -> io::Result<Self> {
        let file = fs::metadata(path)?;
        Ok(Self {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    }
}

/// The kernel that VMs boot, and what it starts first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFiles {
    /// An uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// The initramfs with the guest agent.
    pub initramfs: PathBuf,
}

/// A root file system in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootFile {
    /// Its name.
    pub name: RootName,
    /// The size of the file system, in bytes.
    pub size_bytes: u64,
    /// Disk space that its file takes, in bytes.
    pub disk_bytes: u64,
}

/// The files that a VM boots from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// An uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// The initramfs with the guest agent.
    pub initramfs: PathBuf,
    /// An ext4 file.
    pub root: PathBuf,
}

/// Summary of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSummary {
    /// The image's name.
    pub name: String,
    /// The size of its file system.
    pub size_bytes: u64,
    /// Disk space that its file takes.
    pub disk_bytes: u64,
    /// The recipe or archive that it was made from.
    pub source: String,
}

/// A file that a VM boots from has not been built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no {missing} has been built; run `bhatti setup`")]
pub struct MissingImages {
    missing: String,
}

/// The store could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// An artifact has not been built.
    #[error(transparent)]
    Missing(#[from] MissingImages),
    /// A file could not be read or written.
    #[error("failed to {step} `{}`", path.display())]
    File {
        /// The step that failed.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The index is damaged.
    #[error("the image index `{}` is damaged; remove it and run `bhatti setup`", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// Position and cause of the damage.
        #[source]
        source: serde_json::Error,
    },
    /// An initramfs could not be built.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The index names a file that cannot be a root file system.
    #[error(transparent)]
    Root(#[from] ParseRootError),
}

/// An artifact and its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Artefact {
    /// Name of its file or directory, inside the store.
    pub(crate) name: String,
    /// The package, file or recipe that it was made from.
    pub(crate) source: String,
}

/// Directories whose VMs and snapshots depend on images.
const USERS_OF_IMAGES: [&str; 3] = ["sandboxes", "snapshots", "templates"];

/// Prefixes of the names of artifacts.
const ARTEFACTS: [&str; 3] = ["kernel-", "rootfs-", "initramfs-"];

/// Prefixes of the root file systems of users' images. The index does not name them: the daemon
/// knows which of them are in use.
const USERS_ROOTS: [&str; 2] = ["rootfs-oci", "rootfs-tar"];

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Index {
    pub(crate) kernel: Option<Artefact>,
    #[serde(default)]
    pub(crate) images: BTreeMap<String, Artefact>,
}

impl ImageStore {
    /// Returns the store of a data directory. The directory does not need to exist yet.
    #[must_use]
    pub fn new(data_dir: &Path) -> Self {
        // This very program, also if its file has been replaced since it started.
        let program = PathBuf::from("/proc/self/exe");
        Self { directory: data_dir.join("images"), program, initramfs: Arc::default() }
    }

    /// Unpacks archives with another program than this process's own. It must be `bhatti`.
    #[must_use]
    pub fn with_program(self, program: PathBuf) -> Self {
        Self { program, ..self }
    }

    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Returns the directory of the artifacts.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the boot files of `image`, with an initramfs that has exactly this `lohar`. Builds
    /// the initramfs if it does not exist.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::Missing`] if `bhatti setup` has not been run. Blocks on disk.
    pub fn boot_files(&self, image: &str, lohar: &Path) -> Result<BootFiles, StoreError> {
        let KernelFiles { kernel, initramfs } = self.kernel_files(lohar)?;
        let root = self.root_of(image)?;
        let root = root.ok_or_else(|| MissingImages { missing: format!("image `{image}`") })?;
        Ok(BootFiles { kernel, initramfs, root: self.existing(root.as_str())? })
    }

    /// Returns the boot files of a root file system, as [`boot_files`](Self::boot_files).
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::Missing`] if the file or the kernel is missing. Blocks on disk.
    pub fn boot_files_of(&self, root: &RootName, lohar: &Path) -> Result<BootFiles, StoreError> {
        let KernelFiles { kernel, initramfs } = self.kernel_files(lohar)?;
        Ok(BootFiles { kernel, initramfs, root: self.existing(root.as_str())? })
    }

    /// Returns the kernel, and an initramfs that has exactly this `lohar`. Builds the initramfs if
    /// it does not exist.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::Missing`] if `bhatti setup` has not been run. Blocks on disk.
    pub fn kernel_files(&self, lohar: &Path) -> Result<KernelFiles, StoreError> {
        let missing = || MissingImages { missing: "kernel".to_owned() };
        let kernel = self.read_index()?.kernel.ok_or_else(missing)?;
        let directory = self.existing(&kernel.name)?;
        let initramfs = self.initramfs(lohar, &directory)?;
        Ok(KernelFiles { kernel: directory.join("vmlinux"), initramfs })
    }

    /// Returns the root file system of an image that was built on this host, by the image's name.
    ///
    /// # Errors
    ///
    /// Returns an error if the index cannot be read. Blocks on disk.
    pub fn root_of(&self, image: &str) -> Result<Option<RootName>, StoreError> {
        let root = self.read_index()?.images.get(image).map(|artefact| artefact.name.parse());
        Ok(root.transpose()?)
    }

    /// Returns what is known of a root file system.
    ///
    /// # Errors
    ///
    /// Returns an error if its file cannot be examined. Blocks on disk.
    pub fn root(&self, name: &RootName) -> Result<RootFile, StoreError> {
        let path = self.directory.join(name.as_str());
        let file = fs::metadata(&path).map_err(file_error("read the metadata of", &path))?;
        let (size_bytes, disk_bytes) = (file.len(), file.blocks() * 512);
        Ok(RootFile { name: name.clone(), size_bytes, disk_bytes })
    }

    /// Names of the images that have been built.
    ///
    /// # Errors
    ///
    /// Returns an error if the index cannot be read.
    pub fn images(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.read_index()?.images.into_keys().collect())
    }

    /// The images that have been built, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the index or a file cannot be read.
    pub fn summaries(&self) -> Result<Vec<ImageSummary>, StoreError> {
        let images = self.read_index()?.images.into_iter();
        let summary = |(name, artefact): (String, Artefact)| {
            let RootFile { size_bytes, disk_bytes, .. } = self.root(&artefact.name.parse()?)?;
            Ok(ImageSummary { name, size_bytes, disk_bytes, source: artefact.source })
        };
        images.map(summary).collect()
    }

    fn initramfs(&self, lohar: &Path, kernel: &Path) -> Result<PathBuf, StoreError> {
        // Taken before the file is read: a later write makes another version.
        let version = FileVersion::of(lohar).map_err(file_error("read the metadata of", lohar))?;
        let made = self.initramfs.lock().clone();
        if let Some(made) = made
            && (made.lohar, made.kernel.as_path()) == (version, kernel)
            && made.path.exists()
        {
            return Ok(made.path);
        }
        let archive = initramfs::build(lohar, kernel)?;
        let path =
            self.directory.join(format!("initramfs-{}.cpio", content_hash::of_bytes(&archive)));
        if !path.exists() {
            durable::write(&path, &archive).map_err(file_error("write", &path))?;
        }
        let made = Initramfs { path: path.clone(), lohar: version, kernel: kernel.to_owned() };
        *self.initramfs.lock() = Some(made);
        Ok(path)
    }

    /// Removes the root file systems of users' images that are not in `used` and that the index
    /// does not name. Returns the bytes that this frees.
    ///
    /// # Errors
    ///
    /// Returns an error if a file cannot be removed. Blocks on disk.
    pub fn collect(&self, used: &BTreeSet<RootName>) -> Result<u64, StoreError> {
        let index = self.read_index()?;
        let mut freed = 0;
        for entry in fs::read_dir(&self.directory).map_err(file_error("list", &self.directory))? {
            let path = entry.map_err(file_error("list", &self.directory))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_users = USERS_ROOTS.iter().any(|kind| name.starts_with(kind));
            let Ok(name) = name.parse::<RootName>() else { continue };
            let is_named = index.images.values().any(|image| image.name == name.as_str());
            if !is_users || is_named || used.contains(&name) {
                continue;
            }
            let bytes = self.root(&name)?.disk_bytes;
            fs::remove_file(&path).map_err(file_error("remove", &path))?;
            freed += bytes;
        }
        Ok(freed)
    }

    /// Removes artifacts that neither the index nor `initramfs` names, because a rebuilt one has
    /// replaced them. VMs have hard links to their artifacts. Where hard links do not work, VMs
    /// have symbolic links, and nothing is removed.
    pub(crate) fn prune(&self, index: &Index, initramfs: &Path) -> Result<(), StoreError> {
        if !self.is_linked_to(USERS_OF_IMAGES) {
            return Ok(());
        }
        let named: Vec<&str> =
            index.kernel.iter().chain(index.images.values()).map(|it| it.name.as_str()).collect();
        for entry in fs::read_dir(&self.directory).map_err(file_error("list", &self.directory))? {
            let path = entry.map_err(file_error("list", &self.directory))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_users = USERS_ROOTS.iter().any(|kind| name.starts_with(kind));
            let is_artefact = ARTEFACTS.iter().any(|kind| name.starts_with(kind)) && !is_users;
            if !is_artefact || named.contains(&name.as_str()) || path == initramfs {
                continue;
            }
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(file_error("remove", &path))?;
        }
        Ok(())
    }

    /// Whether files of the store can be hard-linked into these directories beside it. Skips
    /// directories that do not exist.
    fn is_linked_to(&self, directories: [&str; 3]) -> bool {
        let data_dir = self.directory.parent().unwrap_or(&self.directory);
        directories.iter().map(|name| data_dir.join(name)).filter(|path| path.exists()).all(
            |path| {
                let link = path.join(".link-test");
                let linked = fs::hard_link(self.directory.join(".lock"), &link);
                let _left_by_an_earlier_try = fs::remove_file(&link);
                linked.is_ok()
            },
        )
    }

    fn existing(&self, name: &str) -> Result<PathBuf, MissingImages> {
        let path = self.directory.join(name);
        if path.exists() { Ok(path) } else { Err(MissingImages { missing: format!("`{name}`") }) }
    }

    /// Returns the artifact, if it was made from `source` and still exists.
    pub(crate) fn current<'a>(
        &self,
        artefact: Option<&'a Artefact>,
        source: &str,
    ) -> Option<&'a Artefact> {
        artefact
            .filter(|artefact| artefact.source == source && self.existing(&artefact.name).is_ok())
    }

    pub(crate) fn read_index(&self) -> Result<Index, StoreError> {
        let path = self.directory.join(INDEX);
        match fs::read(&path) {
            Ok(json) => {
                serde_json::from_slice(&json).map_err(|source| StoreError::Index { path, source })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Index::default()),
            Err(source) => Err(file_error("read", &path)(source)),
        }
    }

    pub(crate) fn write_index(&self, index: &Index) -> Result<(), StoreError> {
        let path = self.directory.join(INDEX);
        let json = serde_json::to_vec_pretty(index)
            .map_err(|source| StoreError::Index { path: path.clone(), source })?;
        durable::write(&path, &json).map_err(file_error("write", &path))
    }

    /// Makes the directory and takes the build lock. Removes builds that an earlier holder left
    /// behind.
    pub(crate) fn lock(&self) -> Result<File, StoreError> {
        fs::create_dir_all(&self.directory).map_err(file_error("create", &self.directory))?;
        let path = self.directory.join(".lock");
        let file = File::create(&path).map_err(file_error("create", &path))?;
        file.lock().map_err(file_error("lock", &path))?;
        for entry in
            fs::read_dir(&self.directory).map_err(file_error("list", &self.directory))?.flatten()
        {
            if entry.file_name().to_string_lossy().starts_with(BUILD_PREFIX) {
                fs::remove_dir_all(entry.path()).map_err(file_error("remove", &entry.path()))?;
            }
        }
        Ok(file)
    }
}

pub(crate) fn file_error(
    step: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::File { step, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a store with a kernel and an image, in files of a few bytes.
    fn store() -> (tempfile::TempDir, ImageStore, PathBuf) {
        let data = tempfile::tempdir().unwrap();
        let store = ImageStore::new(data.path());
        let kernel = Artefact { name: "kernel-1".into(), source: "k".into() };
        let image = Artefact { name: "rootfs-1.ext4".into(), source: "r".into() };
        fs::create_dir_all(store.directory().join("kernel-1/modules")).unwrap();
        fs::write(store.directory().join("rootfs-1.ext4"), "").unwrap();
        store
            .write_index(&Index {
                kernel: Some(kernel),
                images: [("minimal".into(), image)].into(),
            })
            .unwrap();
        let lohar = data.path().join("lohar");
        fs::write(&lohar, "first").unwrap();
        (data, store, lohar)
    }

    #[test]
    fn initramfs_is_rebuilt_only_when_its_inputs_change() {
        let (_data, store, lohar) = store();
        let first = store.boot_files("minimal", &lohar).unwrap().initramfs;
        // The store must not need the inputs any more.
        fs::remove_dir(store.directory().join("kernel-1/modules")).unwrap();
        assert_eq!(store.boot_files("minimal", &lohar).unwrap().initramfs, first);

        fs::write(&lohar, "other").unwrap();
        store.boot_files("minimal", &lohar).unwrap_err();
        fs::create_dir(store.directory().join("kernel-1/modules")).unwrap();
        assert_ne!(store.boot_files("minimal", &lohar).unwrap().initramfs, first);
        fs::write(&lohar, "first").unwrap();
        assert_eq!(store.boot_files("minimal", &lohar).unwrap().initramfs, first);
        fs::remove_file(&first).unwrap();
        store.boot_files("minimal", &lohar).unwrap();
        assert!(first.exists(), "a removed initramfs is built again");
    }

    #[test]
    fn replaced_artifacts_are_removed() {
        let data = tempfile::tempdir().unwrap();
        let store = ImageStore::new(data.path());
        let directory = store.directory().to_owned();
        fs::create_dir_all(directory.join("kernel-old")).unwrap();
        for name in [
            "kernel-old/vmlinux",
            "rootfs-a-1.ext4",
            "rootfs-a-2.ext4",
            "rootfs-oci1-3.ext4",
            "rootfs-tar1-4.ext4",
            "initramfs-1.cpio",
            "initramfs-2.cpio",
            "index.json",
        ] {
            fs::write(directory.join(name), name).unwrap();
        }
        let artefact = |name: &str| Artefact { name: name.into(), source: String::new() };
        let images = [("a".to_owned(), artefact("rootfs-a-2.ext4"))].into();
        let index = Index { kernel: None, images };

        store.prune(&index, &directory.join("initramfs-2.cpio")).unwrap();

        let mut left: Vec<_> =
            fs::read_dir(directory).unwrap().map(|it| it.unwrap().file_name()).collect();
        left.sort();
        let users = ["rootfs-oci1-3.ext4", "rootfs-tar1-4.ext4"];
        let built = ["index.json", "initramfs-2.cpio", "rootfs-a-2.ext4"];
        assert_eq!(left, [&built[..], &users].concat());
        store.write_index(&index).unwrap();

        let freed = store.collect(&[users[1].parse().unwrap()].into()).unwrap();

        assert!(freed > 0);
        let is_there = |name: &&str| store.directory().join(name).exists();
        assert_eq!(users.map(|name| is_there(&name)), [false, true]);
        assert!(built.iter().all(is_there));
    }

    #[test]
    fn error_without_a_build_names_the_command_to_run() {
        let data = tempfile::tempdir().unwrap();

        let error =
            ImageStore::new(data.path()).boot_files("minimal", Path::new("lohar")).unwrap_err();

        assert_eq!(error.to_string(), "no kernel has been built; run `bhatti setup`");
    }

    #[test]
    fn changed_agent_gets_another_initramfs() {
        let (_data, store, lohar) = store();
        let first = store.boot_files("minimal", &lohar).unwrap();
        assert_eq!(store.boot_files("minimal", &lohar).unwrap(), first);

        fs::write(&lohar, "second").unwrap();

        let second = store.boot_files("minimal", &lohar).unwrap();
        assert_ne!(second.initramfs, first.initramfs);
        assert!(first.initramfs.exists() && second.initramfs.exists());
    }

    #[test]
    fn unknown_image_and_lost_file_are_missing() {
        let (_data, store, lohar) = store();
        let unknown = store.boot_files("other", &lohar).unwrap_err();
        assert!(matches!(unknown, StoreError::Missing(_)), "{unknown}");

        fs::remove_file(store.directory().join("rootfs-1.ext4")).unwrap();

        let lost = store.boot_files("minimal", &lohar).unwrap_err();
        assert!(matches!(lost, StoreError::Missing(_)), "{lost}");
    }

    #[test]
    fn damaged_index_is_an_error_that_names_it() {
        let (_data, store, lohar) = store();
        fs::write(store.directory().join(INDEX), "{").unwrap();

        let error = store.boot_files("minimal", &lohar).unwrap_err();

        assert!(
            matches!(&error, StoreError::Index { path, .. } if path.ends_with(INDEX)),
            "{error}"
        );
    }

    #[test]
    fn lock_removes_leftovers_of_an_interrupted_build() {
        let (_data, store, _lohar) = store();
        let left = store.directory().join(format!("{BUILD_PREFIX}dead"));
        fs::create_dir_all(left.join("deep")).unwrap();

        let _lock = store.lock().unwrap();

        assert!(!left.exists());
    }
}
