//! Images made of archives that somebody brings, and their end.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use bhatti_types::ImageName;

use tokio::task::spawn_blocking;

use crate::DEFAULT_IMAGE;
use crate::archive::{ArchiveError, root_tar};
use crate::rootfs::{self, DISK_MIB};
use crate::setup::{Build, SetupError, finish_image};
use crate::store::{ImageStore, ImageSummary, StoreError, file_error};
use crate::tool::ToolError;

/// The longest tar of a root file system, in bytes: one that fits the disk, and as much for its headers.
const ARCHIVE_BYTES_MAX: u64 = (2 * DISK_MIB as u64) << 20;

/// What `mke2fs` says when a tree does not fit.
const FULL: &str = "Could not allocate";

/// An archive did not become an image. The images are what they were.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// There is an image of that name.
    #[error("image `{0}` already exists")]
    NameTaken(ImageName),
    /// It cannot be unpacked.
    #[error("the archive cannot be unpacked: {complaint}")]
    Archive {
        /// What `tar` says about it.
        complaint: String,
    },
    /// What is in it does not fit.
    #[error("what is in the archive does not fit a disk of {DISK_MIB} MiB")]
    TooLarge,
    /// A program could not be run.
    #[error("failed to unpack the archive")]
    Tool(#[source] ToolError),
    /// A file of this host could not be read or written.
    #[error("failed to unpack the archive")]
    File(#[source] io::Error),
    /// It could not be put in place.
    #[error(transparent)]
    Build(#[from] SetupError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An image could not be taken away.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// There is none of that name.
    #[error("image `{0}` not found")]
    NotFound(ImageName),
    /// It is the one that `bhatti setup` makes.
    #[error("image `{0}` is the one that sandboxes have unless they ask for another")]
    IsDefault(ImageName),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<ArchiveError> for ImportError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Bad(complaint) => Self::Archive { complaint },
            ArchiveError::TooLarge { .. } => Self::TooLarge,
            ArchiveError::File(error) => Self::File(error),
        }
    }
}

impl ImageStore {
    /// A file without a name for an archive that is on its way: nothing of it stays, however its writer ends.
    ///
    /// # Errors
    ///
    /// Returns an error if none can be made.
    pub fn upload(&self) -> Result<File, StoreError> {
        let directory = self.directory();
        fs::create_dir_all(directory).map_err(file_error("create", directory))?;
        tempfile::tempfile_in(directory).map_err(file_error("create a file in", directory))
    }

    /// Makes an image of a tar archive: a root file system, as `docker export` writes it, an image,
    /// as `docker save` writes it, or an OCI layout. It may be compressed with gzip, xz or zstd.
    /// Everything in it is the image's, and nothing of it is run.
    ///
    /// # Errors
    ///
    /// Returns [`ImportError::Archive`] if it is none, and [`ImportError::NameTaken`] if there is an image of that name.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is as killing the process: the next build cleans up.
    pub async fn import(
        &self,
        name: &ImageName,
        archive: File,
    ) -> Result<ImageSummary, ImportError> {
        let store = self.clone();
        let archive_bytes =
            archive.metadata().map_err(file_error("look at", self.directory()))?.len();
        let locked = tokio::task::spawn_blocking(move || store.lock()).await;
        // A lock that cannot be waited for is a runtime that ends.
        let _lock = locked
            .map_err(std::io::Error::other)
            .map_err(file_error("lock", self.directory()))??;
        let mut index = self.read_index()?;
        if index.images.contains_key(name.as_str()) {
            return Err(ImportError::NameTaken(name.clone()));
        }
        // Unpacked and as an image, and both may be several times as large as what was compressed.
        let build = Build::start(self, "image", archive_bytes.saturating_mul(2))?;
        let (build, image) = unpack(build, archive).await?;
        let source = format!("imported archive of {archive_bytes} bytes");
        let artefact = finish_image(build, self, name.as_str(), &image, source)?;
        index.images.insert(name.as_str().to_owned(), artefact);
        self.write_index(&index)?;
        let summary = self.summaries()?.into_iter().find(|image| image.name == name.as_str());
        Ok(summary.unwrap_or_else(|| ImageSummary {
            name: name.to_string(),
            size_bytes: 0,
            disk_bytes: 0,
            source: String::new(),
        }))
    }

    /// Takes an image away. Sandboxes that were made of it go on, if their disks have it by a link of their own; the caller makes sure
    /// that there are none.
    ///
    /// # Errors
    ///
    /// Returns [`RemoveError::NotFound`] if there is no such image. Blocks on disk, and while something is built.
    pub fn remove(&self, name: &ImageName) -> Result<(), RemoveError> {
        if name.as_str() == DEFAULT_IMAGE {
            return Err(RemoveError::IsDefault(name.clone()));
        }
        let _lock = self.lock()?;
        let mut index = self.read_index()?;
        let removed = index.images.remove(name.as_str());
        let removed = removed.ok_or_else(|| RemoveError::NotFound(name.clone()))?;
        self.write_index(&index)?;
        if index.images.values().all(|other| other.name != removed.name) {
            let path = self.directory().join(&removed.name);
            fs::remove_file(&path).map_err(file_error("remove", &path))?;
        }
        Ok(())
    }
}

/// Unpacks an archive and writes it into an ext4 file.
async fn unpack(build: Build, archive: File) -> Result<(Build, PathBuf), ImportError> {
    let scratch = build.path().to_owned();
    let flattened = spawn_blocking(move || root_tar(archive, &scratch, ARCHIVE_BYTES_MAX)).await;
    let archive = flattened.map_err(io::Error::other).map_err(ArchiveError::File).flatten()?;
    let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), archive.as_raw_fd()));
    let image = build.path().join("root.ext4");
    let made = rootfs::make_ext4(build.path(), &path, &image, DISK_MIB).await;
    // It had to stay open until it was unpacked.
    drop(archive);
    match made {
        Ok(()) => Ok((build, image)),
        Err(ToolError::Failed { output, .. }) if output.contains(FULL) => {
            Err(ImportError::TooLarge)
        }
        Err(ToolError::Failed { output, .. }) => {
            let own =
                |line: &&str| !line.ends_with("Exiting with failure status due to previous errors");
            let complaint = output.lines().rfind(own).unwrap_or_default();
            let complaint = complaint.replace(&*path.to_string_lossy(), "archive");
            let complaint = complaint.strip_prefix("tar: ").unwrap_or(&complaint).to_owned();
            Err(ImportError::Archive { complaint })
        }
        Err(error) => Err(ImportError::Tool(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn store() -> (tempfile::TempDir, ImageStore) {
        let data = tempfile::tempdir().unwrap();
        let store = ImageStore::new(data.path());
        (data, store)
    }

    fn archive(store: &ImageStore, bytes: &[u8]) -> File {
        let mut file = store.upload().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A tar archive with one file, `etc/motd`.
    async fn small_tar() -> Vec<u8> {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("etc")).unwrap();
        fs::write(tree.path().join("etc/motd"), "hello\n").unwrap();
        let mut tar = bhatti_host::process::command("tar");
        tar.args(["-cz", "-C"]).arg(tree.path()).arg(".").output().await.unwrap().stdout
    }

    #[tokio::test]
    async fn archive_becomes_an_image_once_and_can_be_taken_away() {
        let (_data, store) = store();
        let name: ImageName = "small".parse().unwrap();
        let tar = small_tar().await;

        let made = store.import(&name, archive(&store, &tar)).await.unwrap();

        assert_eq!((&*made.name, made.size_bytes), ("small", u64::from(DISK_MIB) << 20));
        // Its tables of inodes alone are 64 MiB, which file systems keep in more or less room.
        assert!(made.disk_bytes < made.size_bytes / 10, "{}", made.disk_bytes);
        let file = fs::read_dir(store.directory()).unwrap().flatten();
        let file = file
            .map(|entry| entry.path())
            .find(|path| path.extension() == Some("ext4".as_ref()))
            .unwrap();
        let shown = bhatti_host::process::command("debugfs")
            .args(["-R", "cat etc/motd"])
            .arg(&file)
            .output()
            .await
            .unwrap();
        assert_eq!(shown.stdout, b"hello\n");
        let again = store.import(&name, archive(&store, &tar)).await.unwrap_err();
        assert!(matches!(again, ImportError::NameTaken(_)), "{again}");

        store.remove(&name).unwrap();

        assert!(!file.exists());
        assert_eq!(store.summaries().unwrap(), []);
        assert!(matches!(store.remove(&name), Err(RemoveError::NotFound(_))));
    }

    /// The processes that work in a directory of the store, by their names.
    fn working_in(store: &ImageStore) -> Vec<String> {
        let processes = fs::read_dir("/proc").unwrap().flatten().filter(|process| {
            fs::read_link(process.path().join("cwd"))
                .is_ok_and(|directory| directory.starts_with(store.directory()))
        });
        let names = processes.flat_map(|process| fs::read_to_string(process.path().join("comm")));
        // Without root, a `faked` of fakeroot stays.
        names.map(|name| name.trim().to_owned()).filter(|name| !name.starts_with("faked")).collect()
    }

    #[tokio::test]
    async fn abandoned_import_leaves_no_process() {
        let (_data, store) = store();
        // So many files that the import can be seen while it works.
        let mut tar = tar::Builder::new(Vec::new());
        for number in 0..60_000 {
            let mut header = tar::Header::new_gnu();
            header.set_size(0);
            tar.append_data(&mut header, format!("file-{number}"), &[][..]).unwrap();
        }
        let archive = archive(&store, &tar.into_inner().unwrap());
        let importing = store.clone();
        let import =
            tokio::spawn(async move { importing.import(&"many".parse().unwrap(), archive).await });
        let unpacks = || working_in(&store).iter().any(|name| name == "tar");
        bhatti_testkit::wait_for("tar to unpack", unpacks).await;

        import.abort();

        bhatti_testkit::wait_for("its processes to end", || working_in(&store).is_empty()).await;
        assert!(import.await.unwrap_err().is_cancelled());
    }

    /// Compresses with xz, and has the header of the block ask for a dictionary of 1.5 GiB.
    fn xz_with_a_large_dictionary(content: &[u8]) -> Vec<u8> {
        // The .xz file format: the stream's header has 12 bytes; the block's then has its size,
        // flags, the filter's id and length, the dictionary's size, padding, and a CRC32.
        const BLOCK: usize = 12;
        const DICTIONARY: usize = BLOCK + 4;
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
        encoder.write_all(content).unwrap();
        let mut bytes = encoder.finish().unwrap();
        bytes[DICTIONARY] = 37;
        let crc = BLOCK + usize::from(bytes[BLOCK]) * 4;
        let mut sum = flate2::Crc::new();
        sum.update(&bytes[BLOCK..crc]);
        bytes[crc..crc + 4].copy_from_slice(&sum.sum().to_le_bytes());
        bytes
    }

    #[tokio::test]
    async fn xz_archive_that_takes_too_much_memory_is_refused() {
        let (_data, store) = store();
        let bytes = xz_with_a_large_dictionary(&[0; 10240]);

        let error =
            store.import(&"large".parse().unwrap(), archive(&store, &bytes)).await.unwrap_err();

        assert!(error.to_string().contains("memory"), "{error}");
    }

    #[tokio::test]
    async fn what_is_no_archive_is_refused_without_a_path_of_this_host_and_leaves_nothing() {
        let (_data, store) = store();
        let name: ImageName = "bad".parse().unwrap();
        let empty_tar = vec![0; 10240];
        // bzip2, which `tar` would decompress without a limit.
        let bzip2 = b"BZh91AY&SY\x00\x00\x00\x00".repeat(100);
        for bytes in
            [&b"not a tar archive, but text"[..], &empty_tar, &small_tar().await[..60], &bzip2]
        {
            let error = store.import(&name, archive(&store, bytes)).await.unwrap_err();

            assert!(matches!(error, ImportError::Archive { .. }), "{error}");
            assert!(!error.to_string().contains('/'), "{error}");
        }
        let left: Vec<_> =
            fs::read_dir(store.directory()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, [".lock"]);
    }

    /// What debugfs prints about the one image in a store.
    async fn debugfs(store: &ImageStore, request: &str) -> String {
        let files = fs::read_dir(store.directory()).unwrap().flatten().map(|entry| entry.path());
        let mut images = files.filter(|path| path.extension() == Some("ext4".as_ref()));
        let mut debugfs = bhatti_host::process::command("debugfs");
        let shown =
            debugfs.args(["-R", request]).arg(images.next().unwrap()).output().await.unwrap();
        String::from_utf8(shown.stdout).unwrap()
    }

    #[tokio::test]
    async fn capabilities_of_files_are_imported() {
        if !rustix::process::geteuid().is_root() {
            bhatti_testkit::skip("capabilities of an imported file", "only root can set them");
            return;
        }
        let (_data, store) = store();
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("ping"), "program").unwrap();
        let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let file = tree.path().join("ping");
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&file, "security.capability", capability, flags).unwrap();
        let mut tar = bhatti_host::process::command("tar");
        let tar = tar
            .args(["--xattrs", "--xattrs-include=*", "-C"])
            .arg(tree.path())
            .args(["-cz", "ping"]);
        let tar = tar.output().await.unwrap().stdout;

        store.import(&"caps".parse().unwrap(), archive(&store, &tar)).await.unwrap();

        let listed = debugfs(&store, "ea_list ping").await;
        assert!(listed.contains("security.capability (20)"), "{listed}");
    }

    #[tokio::test]
    async fn image_that_docker_saved_is_imported() {
        let Some(socket) =
            std::env::var_os("DOCKER_SOCK").filter(|path| std::path::Path::new(path).exists())
        else {
            bhatti_testkit::skip("importing what `docker save` writes", "no Docker runs here");
            return;
        };
        let docker = async |arguments: &[&str], input: File| {
            let mut docker = bhatti_host::process::command("docker");
            docker
                .arg("--host")
                .arg(format!("unix://{}", socket.to_string_lossy()))
                .args(arguments)
                .stdin(input);
            let ran = docker.output().await.unwrap();
            assert!(
                ran.status.success(),
                "{arguments:?}: {}",
                String::from_utf8_lossy(&ran.stderr)
            );
            ran.stdout
        };
        let (_data, store) = store();
        let none = || File::open("/dev/null").unwrap();
        let mut first = store.upload().unwrap();
        first.write_all(&small_tar().await).unwrap();
        io::Seek::rewind(&mut first).unwrap();
        docker(&["import", "-", "bhatti-test-layers:1"], first).await;
        let container = docker(&["create", "bhatti-test-layers:1", "/none"], none()).await;
        let container = String::from_utf8(container).unwrap().trim().to_owned();
        let added = tempfile::tempdir().unwrap();
        fs::write(added.path().join("added"), "second layer\n").unwrap();
        let from = format!("{}/added", added.path().display());
        docker(&["cp", &from, &format!("{container}:/etc/added")], none()).await;
        docker(&["commit", &container, "bhatti-test-layers:2"], none()).await;
        let saved = docker(&["save", "bhatti-test-layers:2"], none()).await;
        docker(&["rm", "-f", &container], none()).await;
        docker(&["rmi", "bhatti-test-layers:2", "bhatti-test-layers:1"], none()).await;

        store.import(&"saved".parse().unwrap(), archive(&store, &saved)).await.unwrap();

        assert_eq!(debugfs(&store, "cat etc/motd").await, "hello\n");
        assert_eq!(debugfs(&store, "cat etc/added").await, "second layer\n");
    }

    #[test]
    fn the_usual_image_stays() {
        let (_data, store) = store();
        let error = store.remove(&DEFAULT_IMAGE.parse().unwrap()).unwrap_err();
        assert!(matches!(error, RemoveError::IsDefault(_)), "{error}");
    }
}
