//! Imports archives as images, and removes images.

use std::fs::{self, File};
use std::io;

use bhatti_host::{blocking, disk};
use bhatti_types::{ImageConfig, ImageName};
use ring::digest::{SHA256, digest};
use tokio::task::spawn_blocking;

use crate::DEFAULT_IMAGE;
use crate::archive::{self, ArchiveError, ArchivedImage, LayerFile, is_compressed};
use crate::config::{self, Configuration};
use crate::import_error::ImportError;
use crate::layered::LayeredBuild;
use crate::store::{ImageStore, RootFile, StoreError, file_error};
use crate::unpack::Unpacker;

/// An image from an archive.
#[derive(Debug)]
pub struct Imported {
    /// Its root file system.
    pub root: RootFile,
    /// Its settings; none if the archive was that of a root file system.
    pub config: ImageConfig,
    /// Length of the archive.
    pub archive_bytes: u64,
    /// Its configuration, as JSON.
    pub written_config: Vec<u8>,
    /// Its layers, lowest first.
    pub layers: Vec<LayerFile>,
    /// SHA-256 of what the layers unpack to, as tar archives, in hexadecimal.
    pub diff_ids: Vec<String>,
}

/// An image could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// There is no image of that name.
    #[error("image `{0}` not found")]
    NotFound(ImageName),
    /// It is the default image, which `bhatti setup` builds.
    #[error("image `{0}` is the default image, which cannot be removed")]
    IsDefault(ImageName),
    /// The process is ending.
    #[error("the daemon stopped before the image was removed")]
    Interrupted,
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ImageStore {
    /// Makes an unnamed file for an archive that is being uploaded. Nothing of it stays, however
    /// the upload ends.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be made.
    pub fn upload(&self) -> Result<File, StoreError> {
        let directory = self.directory();
        fs::create_dir_all(directory).map_err(file_error("create", directory))?;
        tempfile::tempfile_in(directory).map_err(file_error("create a file in", directory))
    }

    /// Imports a tar archive as an image: a root file system as `docker export` writes it, an
    /// image as `docker save` writes it, or an OCI layout. It may be compressed with gzip, xz or
    /// zstd. All of its content becomes part of the image, and nothing in it is run. The image's
    /// files have at most `bytes_max` bytes. An image that comes without settings gets `settings`;
    /// if there are none, it gets a directory for users' work.
    ///
    /// # Errors
    ///
    /// Returns [`ImportError::Archive`] if the archive is not valid.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing of the build stays.
    pub async fn import(
        &self,
        archive: File,
        bytes_max: Option<u64>,
        settings: Option<ImageConfig>,
    ) -> Result<Imported, ImportError> {
        let build = blocking(|| self.begin_layers(bytes_max))?;
        let sizes = blocking(|| Ok((archive.metadata()?.len(), disk::free_bytes(build.path())?)));
        let (archive_bytes, free_bytes) = sizes.map_err(ImportError::File)?;
        // Space for the unpacked tree and for the image. Both may be several times as large as a
        // compressed archive.
        if archive_bytes.saturating_mul(2) > free_bytes {
            return Err(ImportError::DiskFull { archive_bytes, free_bytes });
        }
        unpack(self, build, archive, (archive_bytes, settings)).await
    }

    /// Removes an image. The caller makes sure that no sandbox, snapshot or template uses it; a
    /// sandbox continues only if its disk has its own hard link to the image.
    ///
    /// # Errors
    ///
    /// Returns [`RemoveError::NotFound`] if there is no such image. Blocks on disk, and while a
    /// build holds the lock.
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
async fn unpack(
    store: &ImageStore,
    mut build: LayeredBuild,
    archive: File,
    (archive_bytes, settings): (u64, Option<ImageConfig>),
) -> Result<Imported, ImportError> {
    let archive = if blocking(|| is_compressed(&archive)).map_err(ImportError::File)? {
        let free = blocking(|| disk::free_bytes(build.path())).map_err(ImportError::File)?;
        Unpacker::new(store.program(), build.path()).decompress(&archive, free / 3).await?
    } else {
        archive
    };
    let found = spawn_blocking(move || archive::read_image(&archive)).await;
    let found = found.map_err(io::Error::other).map_err(ArchiveError::File).flatten()?;
    let ArchivedImage { layers, config } = found;
    let Some(written_config) = config else {
        let mut diff_ids = Vec::new();
        for layer in &layers {
            diff_ids.push(build.apply_part(layer, None).await?);
        }
        let root = build.finish(None, settings.is_none()).await?;
        let config = settings.unwrap_or_default();
        let written_config = config::compose(&config, &diff_ids);
        return Ok(Imported { root, config, archive_bytes, written_config, layers, diff_ids });
    };
    let Configuration { image: config, diff_ids } = Configuration::parse(&written_config)?;
    if diff_ids.len() != layers.len() {
        let complaint = format!(
            "it has {} layers, and its configuration names {}",
            layers.len(),
            diff_ids.len()
        );
        return Err(ImportError::Archive { complaint });
    }
    for (layer, diff_id) in layers.iter().zip(&diff_ids) {
        build.apply_part(layer, Some(diff_id)).await?;
    }
    let sha256 = hex::encode(digest(&SHA256, &written_config));
    let root = build.finish(Some(&sha256), false).await?;
    Ok(Imported { root, config, archive_bytes, written_config, layers, diff_ids })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn store() -> (tempfile::TempDir, ImageStore) {
        let data = tempfile::tempdir().unwrap();
        let store = ImageStore::new(data.path()).with_program(bhatti_testkit::dist("bhatti"));
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
    async fn archive_is_imported_and_its_file_goes_when_nobody_uses_it() {
        let (_data, store) = store();
        let tar = small_tar().await;

        let made = store.import(archive(&store, &tar), None, None).await.unwrap();

        assert_eq!(made.config, ImageConfig::default());
        let RootFile { name, size_bytes, disk_bytes } = made.root.clone();
        assert_eq!(size_bytes, crate::ext4::DISK_MIB << 20);
        // Its inode tables alone have 64 MiB, for which file systems use more or less space.
        assert!(disk_bytes < size_bytes / 10, "{disk_bytes}");
        assert_eq!(debugfs(&store, "cat etc/motd").await, "hello\n");
        assert_eq!(store.collect(&[name.clone()].into()).unwrap(), 0);
        assert_eq!(store.root(&name).unwrap(), made.root);

        assert_eq!(store.collect(&[].into()).unwrap(), disk_bytes);

        assert_eq!(files(&store), [".layers.lock"]);
    }

    /// Returns the names of the files in a store.
    fn files(store: &ImageStore) -> Vec<std::ffi::OsString> {
        fs::read_dir(store.directory()).unwrap().flatten().map(|e| e.file_name()).collect()
    }

    /// Returns the command lines of the processes that work in a directory of the store.
    fn working_in(store: &ImageStore) -> Vec<String> {
        let directory = store.directory().to_string_lossy().into_owned();
        // Without root, a `faked` of fakeroot stays.
        let is_working = |line: &String| line.contains(&directory) && !line.contains("faked");
        command_lines().into_iter().filter(is_working).collect()
    }

    /// Returns the command lines of all processes. Their arguments end with zero bytes.
    fn command_lines() -> Vec<String> {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes.flat_map(|process| fs::read_to_string(process.path().join("cmdline"))).collect()
    }

    #[tokio::test]
    async fn abandoned_import_leaves_no_process() {
        let (_data, store) = store();
        // Enough files that the test sees the import while it works.
        let mut tar = tar::Builder::new(Vec::new());
        for number in 0..60_000 {
            let mut header = tar::Header::new_gnu();
            header.set_size(0);
            tar.append_data(&mut header, format!("file-{number}"), &[][..]).unwrap();
        }
        let archive = archive(&store, &tar.into_inner().unwrap());
        let importing = store.clone();
        let import = tokio::spawn(async move { importing.import(archive, None, None).await });
        let unpacks = || working_in(&store).iter().any(|line| line.contains("image-task"));
        bhatti_testkit::wait_for("a task to unpack it", unpacks).await;

        import.abort();

        bhatti_testkit::wait_for("its processes to end", || working_in(&store).is_empty()).await;
        assert!(import.await.unwrap_err().is_cancelled());
    }

    #[tokio::test]
    async fn task_ends_with_the_process_that_started_it() {
        let directory = tempfile::tempdir().unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_path("large").unwrap();
        // More than the task reads in the time that the test waits.
        header.set_size(900 << 30);
        header.set_cksum();
        let archive = directory.path().join("archive");
        let mut file = File::create(&archive).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len(900 << 30).unwrap();
        let limits = format!(r#"{{"entries":1,"bytes":{}}}"#, 1_u64 << 40);
        let task =
            format!(r#"{{"Apply":{{"offset":0,"bytes":{},"limits":{limits}}}}}"#, 900_u64 << 30);
        // The shell does not wait for the task.
        let mut shell = bhatti_host::process::command("sh");
        shell.args(["-c", r#""$0" image-task "$1" "$2" $$ <"$3" & exec sleep 600"#]);
        shell.arg(bhatti_testkit::dist("bhatti")).arg(task).arg(directory.path()).arg(&archive);
        let mut shell = shell.spawn().unwrap();
        let named = directory.path().to_string_lossy().into_owned();
        let runs = || {
            command_lines().iter().any(|line| {
                line.contains("image-task\0{\"Apply")
                    && line.contains(&named)
                    && !line.starts_with("sh\0")
            })
        };
        bhatti_testkit::wait_for("the task to run", runs).await;

        shell.kill().await.unwrap();

        bhatti_testkit::wait_for("the task to end", || !runs()).await;
    }

    /// Compresses with xz, and patches the block's header to ask for a dictionary of 1.5 GiB.
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

        let error = store.import(archive(&store, &bytes), None, None).await.unwrap_err();

        assert!(error.to_string().contains("memory"), "{error}");
    }

    #[tokio::test]
    async fn invalid_archive_is_refused_without_a_host_path_and_leaves_no_files() {
        let (_data, store) = store();
        let empty_tar = vec![0; 10240];
        // bzip2, which `tar` would decompress without a limit.
        let bzip2 = b"BZh91AY&SY\x00\x00\x00\x00".repeat(100);
        for bytes in
            [&b"not a tar archive, but text"[..], &empty_tar, &small_tar().await[..60], &bzip2]
        {
            let error = store.import(archive(&store, bytes), None, None).await.unwrap_err();

            assert!(matches!(error, ImportError::Archive { .. }), "{error}");
            assert!(!error.to_string().contains('/'), "{error}");
        }
        assert_eq!(files(&store), [".layers.lock"]);
    }

    /// Returns the output of debugfs about the one image in a store.
    async fn debugfs(store: &ImageStore, request: &str) -> String {
        let files = fs::read_dir(store.directory()).unwrap().flatten().map(|entry| entry.path());
        let mut images = files.filter(|path| path.extension() == Some("ext4".as_ref()));
        let mut debugfs = bhatti_host::process::command("debugfs");
        let shown =
            debugfs.args(["-R", request]).arg(images.next().unwrap()).output().await.unwrap();
        String::from_utf8(shown.stdout).unwrap()
    }

    #[tokio::test]
    async fn owners_and_capabilities_of_files_are_imported() {
        if !rustix::process::geteuid().is_root() {
            bhatti_testkit::skip("owner of an imported file", "only root can set it");
            return;
        }
        let (_data, store) = store();
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("ping"), "program").unwrap();
        let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let file = tree.path().join("ping");
        std::os::unix::fs::chown(&file, Some(5), Some(6)).unwrap();
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o4511)).unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&file, "security.capability", capability, flags).unwrap();
        let mut tar = bhatti_host::process::command("tar");
        let tar = tar
            .args(["--xattrs", "--xattrs-include=*", "-C"])
            .arg(tree.path())
            .args(["-cz", "ping"]);
        let tar = tar.output().await.unwrap().stdout;

        store.import(archive(&store, &tar), None, None).await.unwrap();

        let listed = debugfs(&store, "ea_list ping").await;
        assert!(listed.contains("security.capability (20)"), "{listed}");
        let stat = debugfs(&store, "stat ping").await;
        assert!(stat.contains("Mode:  04511"), "{stat}");
        assert!(stat.contains("User:     5   Group:     6"), "{stat}");
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
        let change = ["commit", "--change", "CMD [\"serve\"]", &container, "bhatti-test-layers:2"];
        docker(&change, none()).await;
        let saved = docker(&["save", "bhatti-test-layers:2"], none()).await;
        docker(&["rm", "-f", &container], none()).await;
        docker(&["rmi", "bhatti-test-layers:2", "bhatti-test-layers:1"], none()).await;

        let imported = store.import(archive(&store, &saved), None, None).await.unwrap();

        assert_eq!(imported.config.cmd, ["serve"]);
        assert!(imported.root.name.as_str().starts_with("rootfs-oci"), "{:?}", imported.root);

        assert_eq!(debugfs(&store, "cat etc/motd").await, "hello\n");
        assert_eq!(debugfs(&store, "cat etc/added").await, "second layer\n");
    }

    #[test]
    fn default_image_cannot_be_removed() {
        let (_data, store) = store();
        let error = store.remove(&DEFAULT_IMAGE.parse().unwrap()).unwrap_err();
        assert!(matches!(error, RemoveError::IsDefault(_)), "{error}");
    }
}
