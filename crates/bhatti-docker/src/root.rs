//! Root file systems as Docker images.

use bhatti_host::blocking;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bollard::Docker;
use bollard::errors::Error;
use bollard::query_parameters::{
    CreateImageOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptions,
};
use futures_util::TryStreamExt;
use tokio::net::unix::pipe;
use tokio::sync::Mutex;
use tokio_util::io::ReaderStream;
use tracing::{info, warn};

use crate::{io_error, tree};

/// The repository of imported images.
const REPOSITORY: &str = "bhatti-root";

/// The step that imports an image, for errors.
pub(crate) const IMPORT: &str = "import the root file system into Docker";

/// The label with the path of the file that an image was imported from.
const SOURCE: &str = "bhatti.root";

/// The status of a response about an object that does not exist.
pub(crate) const NOT_FOUND: u16 = 404;

/// Imports root file systems, each only once for concurrent callers.
#[derive(Default)]
pub(crate) struct Roots {
    importing: Mutex<()>,
}

impl Roots {
    /// Returns the name of Docker's image of the root file system `disk`. Imports it if needed.
    pub(crate) async fn image(&self, docker: &Docker, disk: &Path) -> io::Result<String> {
        // Resolves links, because several data directories may share one image.
        let disk = &blocking(|| fs::canonicalize(disk))?;
        let tag = blocking(|| tag(disk))?;
        let name = format!("{REPOSITORY}:{tag}");
        let _importing = self.importing.lock().await;
        match docker.inspect_image(&name).await {
            Ok(_) => return Ok(name),
            Err(Error::DockerResponseServerError { status_code: NOT_FOUND, .. }) => {}
            Err(error) => return Err(io_error(error)),
        }
        import(docker, disk, &tag).await?;
        info!(image = name, "Root file system imported into Docker");
        Ok(name)
    }
}

/// Returns a tag that identifies a root file system by path, size and time of change, so that a
/// rewritten file gets another tag.
fn tag(disk: &Path) -> io::Result<String> {
    let file = fs::metadata(disk)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(disk.as_os_str().as_encoded_bytes());
    for number in [file.len().cast_signed(), file.mtime(), file.mtime_nsec()] {
        hasher.update(&number.to_le_bytes());
    }
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

async fn import(docker: &Docker, disk: &Path, tag: &str) -> io::Result<()> {
    let (reader, writer) = io::pipe()?;
    let reader = pipe::Receiver::from_owned_fd(reader.into())?;
    let source = disk.to_owned();
    let writing = tokio::task::spawn_blocking(move || tree::write_tar(&source, writer));
    let options = CreateImageOptionsBuilder::new()
        .from_src("-")
        .repo(REPOSITORY)
        .tag(tag)
        .changes(vec![format!("LABEL {SOURCE}={}", quoted(disk))])
        .build();
    let body = bollard::body_try_stream(ReaderStream::new(reader));
    let imported: Result<Vec<_>, _> =
        docker.create_image(Some(options), Some(body), None).try_collect().await;
    let written = writing.await.map_err(io::Error::other)?;
    let imported = imported.map(drop).map_err(io_error);
    if written.is_err() {
        // Docker may have accepted an incomplete archive as complete.
        drop(
            docker
                .remove_image(&format!("{REPOSITORY}:{tag}"), None::<RemoveImageOptions>, None)
                .await,
        );
    }
    // Returns the error that came first. If the write failed, Docker's error is only about the
    // incomplete archive. If the write failed with a broken pipe, Docker failed first and stopped
    // reading.
    match &written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => imported.and(written),
        _ => written.and(imported),
    }
}

/// Quotes a path as the value of a `LABEL` instruction.
fn quoted(path: &Path) -> String {
    let escaped = path.to_string_lossy().replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{escaped}\"")
}

/// Removes the Docker images whose root file systems no longer exist. Images that containers use
/// stay.
pub(crate) async fn remove_orphans(docker: Docker) {
    let filters = HashMap::from([("label".to_owned(), vec![SOURCE.to_owned()])]);
    let options = ListImagesOptionsBuilder::new().filters(&filters).build();
    let images = match docker.list_images(Some(options)).await {
        Ok(images) => images,
        Err(error) => {
            warn!(%error, "Failed to list Docker's images");
            return;
        }
    };
    for image in images {
        let source = image.labels.get(SOURCE).map(Path::new);
        let current = source.and_then(|source| blocking(|| tag(source)).ok());
        let is_current =
            current.is_some_and(|tag| image.repo_tags.contains(&format!("{REPOSITORY}:{tag}")));
        if is_current {
            continue;
        }
        // Docker refuses to remove an image in use. The next start of the daemon tries again.
        if docker.remove_image(&image.id, None::<RemoveImageOptions>, None).await.is_ok() {
            info!(
                image = image.id,
                "Removed a Docker image whose root file system no longer exists"
            );
        }
    }
}
