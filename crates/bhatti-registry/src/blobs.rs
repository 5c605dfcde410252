//! Blobs on disk, by digest, as registries serve them.
//!
//! ```text
//!  <directory>/
//!    sha256/<HEX>              a whole blob; never written again
//!    partial/<USER>-<HEX>      the beginning of a blob; a later download of this user continues it
//!    partial/new-<RANDOM>      the beginning of a blob that this host makes; nothing continues it
//!    downloaded/<USER>-<HEX>   marks a blob that this user has downloaded
//! ```
//!
//! A blob may be a part of an image that only some users may see, and whoever knows its digest can
//! name it in a manifest. So a user gets a blob that is there already only if it belongs to an
//! image that the user can use, or if the user has downloaded it before. Otherwise it is downloaded
//! again ([`Access`]).

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bhatti_host::{blocking, durable};
use bytes::Bytes;
use http::StatusCode;
use http::header::CONTENT_RANGE;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use ring::digest::{Context, SHA256};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::auth::Credentials;
use crate::client::{Registries, Source};
use crate::error::RegistryError;
use crate::http::HttpError;
use crate::image::Blob;
use crate::reference::Reference;
use crate::retry::Attempts;

/// Time after which a download counts as stalled if no byte arrives.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// The slowest download that is accepted, in bytes per second, after a first time.
const SLOWEST_RATE: u64 = 16 << 10;
const SLOWEST_START: Duration = Duration::from_mins(10);
/// What a connection must bring for the next one not to count as a repetition, in bytes.
const PROGRESS_BYTES_MIN: u64 = 64 << 10;
/// How often a download starts again because its content was wrong.
const RESTARTS: u32 = 1;
/// What a file counts for at least, in bytes.
const INODE_BYTES: u64 = 4096;
/// Size of the buffer for reading a partial blob, in bytes.
const BUFFER: usize = 128 << 10;

/// Prefix of the beginnings of blobs that this host makes. No user has this name.
const NEW: &str = "new-";

/// The blobs of a directory. Clones share their locks.
#[derive(Clone, Debug)]
pub struct Blobs {
    directory: PathBuf,
    /// A lock for each blob that is being downloaded.
    downloads: Arc<Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>>,
}

/// What a user may take from the blobs that are there.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// The user, as a part of the names of files.
    pub user: String,
    /// SHA-256 of the blobs of the images that the user can use, in hexadecimal.
    pub blobs: BTreeSet<String>,
}

/// Receives the number of bytes that have been added to a blob.
pub trait Progress: Sync {
    /// Bytes arrived, or were found on disk.
    fn add(&self, bytes: u64);
    /// The blob starts again; this many bytes do not count any more.
    fn remove(&self, bytes: u64);
}

impl Blobs {
    /// Returns the blobs in `directory`, which is made when it is needed.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), downloads: Arc::default() }
    }

    /// Path of a blob, whether it exists or not.
    #[must_use]
    pub fn path(&self, blob: &Blob) -> PathBuf {
        self.directory.join("sha256").join(&blob.sha256)
    }

    fn partial(&self, access: &Access, blob: &Blob) -> PathBuf {
        self.directory.join("partial").join(format!("{}-{}", access.user, blob.sha256))
    }

    /// The mark of a blob that a user has downloaded.
    fn mark(&self, access: &Access, blob: &Blob) -> PathBuf {
        self.directory.join("downloaded").join(format!("{}-{}", access.user, blob.sha256))
    }

    /// Whether a blob is there that the user may take.
    fn may_take(&self, access: &Access, blob: &Blob) -> bool {
        self.path(blob).exists()
            && (access.blobs.contains(&blob.sha256) || self.mark(access, blob).exists())
    }

    /// Downloads a blob unless it exists and the user may take it. Continues what an earlier
    /// download of the user left. Of two downloads of one blob, the second waits for the first.
    ///
    /// # Errors
    ///
    /// Returns an error that names the registry. What has arrived stays, unless it is wrong.
    ///
    /// # Cancel safety
    ///
    /// What has arrived stays, and the next download continues it.
    pub async fn download(
        &self,
        registries: &Registries,
        reference: &Reference,
        credentials: Option<&Credentials>,
        (access, blob): (&Access, &Blob),
        progress: &dyn Progress,
    ) -> Result<(), RegistryError> {
        let lock = self.lock_of(&blob.sha256);
        let _lock = lock.lock().await;
        if blocking(|| self.may_take(access, blob)) {
            progress.add(blob.bytes);
            return Ok(());
        }
        let limit = SLOWEST_START + Duration::from_secs(blob.bytes / SLOWEST_RATE);
        let mut restarts = 0;
        loop {
            let mut partial = self.open_partial(access, blob, progress).await?;
            let attempts = registries.attempts(reference, credentials);
            let fetched = fetch_all(registries, attempts, blob, &mut partial, progress);
            let fetched = timeout(limit, fetched).await;
            fetched.map_err(|_| stalled(reference.registry()))??;
            match self.finish(partial, (access, blob), reference).await {
                Err(RegistryError::WrongContent { .. }) if restarts < RESTARTS => {
                    progress.remove(blob.bytes);
                    restarts += 1;
                }
                result => return result,
            }
        }
    }

    /// Keeps a short content. Returns its SHA-256, in hexadecimal.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be written. Blocks on disk.
    pub fn keep(&self, content: &[u8]) -> Result<String, RegistryError> {
        let sha256 = hex::encode(ring::digest::digest(&SHA256, content));
        if !self.directory.join("sha256").join(&sha256).exists() {
            self.add(|to| to.write_all(content))?;
        }
        Ok(sha256)
    }

    /// Makes a blob of what `write` writes.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be written. Nothing stays then. Blocks on disk.
    pub fn add(
        &self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Blob, RegistryError> {
        let path = self.directory.join("partial").join(format!("{NEW}{:016x}", fastrand::u64(..)));
        let made = self.add_at(&path, write);
        if made.is_err() {
            let _is_missing = fs::remove_file(&path);
        }
        made.map_err(file_error("write", &path))
    }

    fn add_at(
        &self,
        path: &Path,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<Blob> {
        for name in ["partial", "sha256"] {
            fs::create_dir_all(self.directory.join(name))?;
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let mut counted =
            Counted { file: BufWriter::new(file), hash: Context::new(&SHA256), bytes: 0 };
        write(&mut counted)?;
        let Counted { file, hash, bytes } = counted;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        let blob = Blob { sha256: hex::encode(hash.finish()), bytes };
        durable::rename(path, &self.path(&blob))?;
        Ok(blob)
    }

    /// Opens a blob by its SHA-256, in hexadecimal.
    ///
    /// # Errors
    ///
    /// Returns an error if it does not exist. Blocks on disk.
    pub fn open(&self, sha256: &str) -> Result<File, RegistryError> {
        let path = self.directory.join("sha256").join(sha256);
        File::open(&path).map_err(file_error("open", &path))
    }

    /// Removes the blobs whose SHA-256 is not in `used`, and the beginnings of blobs, except for
    /// the newest ones of `leftover_bytes_max` together: the next download continues them. Returns
    /// the bytes that this frees. No download may be at work.
    ///
    /// # Errors
    ///
    /// Returns an error if a file cannot be removed. Blocks on disk.
    pub fn collect(
        &self,
        used: &BTreeSet<String>,
        leftover_bytes_max: u64,
    ) -> Result<u64, RegistryError> {
        let mut unused = self.unused(used)?;
        unused.sort_by_key(|(changed, ..)| std::cmp::Reverse(*changed));
        let (mut left, mut freed) = (0_u64, 0);
        for (_, bytes, path) in unused {
            let name = path.file_name().unwrap_or_default();
            let is_abandoned = name.as_encoded_bytes().starts_with(NEW.as_bytes());
            if !is_abandoned {
                // A mark has no bytes, but takes an inode.
                left = left.saturating_add(bytes.max(INODE_BYTES));
            }
            if is_abandoned || leftover_bytes_max == 0 || left > leftover_bytes_max {
                fs::remove_file(&path).map_err(file_error("remove", &path))?;
                freed += bytes;
            }
        }
        Ok(freed)
    }

    /// Returns the files that are not blobs in `used`: when they were changed, and their bytes.
    fn unused(&self, used: &BTreeSet<String>) -> Result<Vec<Unused>, RegistryError> {
        let mut unused = Vec::new();
        for (name, keeps) in [("sha256", true), ("partial", false), ("downloaded", false)] {
            let directory = self.directory.join(name);
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(file_error("list", &directory)(error)),
            };
            for entry in entries.flatten() {
                if keeps && used.contains(&*entry.file_name().to_string_lossy()) {
                    continue;
                }
                let Ok(file) = entry.metadata() else { continue };
                unused.push((file.mtime(), file.blocks() * 512, entry.path()));
            }
        }
        Ok(unused)
    }

    /// Returns the lock of a blob. Drops the locks that no download holds.
    fn lock_of(&self, sha256: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut downloads = self.downloads.lock();
        downloads.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = downloads.get(sha256).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        downloads.insert(sha256.to_owned(), Arc::downgrade(&lock));
        lock
    }

    /// Opens the beginning of a blob that an earlier download left, or an empty file.
    async fn open_partial(
        &self,
        access: &Access,
        blob: &Blob,
        progress: &dyn Progress,
    ) -> Result<Partial, RegistryError> {
        let (path, bytes_max) = (self.partial(access, blob), blob.bytes);
        let opened = spawn_blocking(move || Partial::open(path, bytes_max)).await;
        let partial = opened.map_err(io::Error::other).flatten();
        let partial = partial.map_err(file_error("open", &self.partial(access, blob)))?;
        progress.add(partial.bytes);
        Ok(partial)
    }

    /// Checks a whole blob, makes it durable and gives it its name.
    async fn finish(
        &self,
        partial: Partial,
        (access, blob): (&Access, &Blob),
        reference: &Reference,
    ) -> Result<(), RegistryError> {
        let Partial { file, hash, path, .. } = partial;
        if hex::encode(hash.finish()) != blob.sha256 {
            blocking(|| fs::remove_file(&path)).map_err(file_error("remove", &path))?;
            let registry = reference.registry().to_owned();
            return Err(RegistryError::WrongContent { registry, digest: blob.digest() });
        }
        let (from, to, mark) = (path.clone(), self.path(blob), self.mark(access, blob));
        let kept = spawn_blocking(move || {
            file.sync_all()?;
            for path in [&to, &mark] {
                path.parent().map_or(Ok(()), fs::create_dir_all)?;
            }
            durable::rename(&from, &to)?;
            File::create(mark).map(drop)
        });
        let kept = kept.await.map_err(io::Error::other).flatten();
        kept.map_err(file_error("keep", &path))
    }
}

/// A file that may be removed: when it was changed, in seconds since 1970, and its bytes.
type Unused = (i64, u64, PathBuf);

/// Writes a new blob.
struct Counted {
    file: BufWriter<File>,
    hash: Context,
    bytes: u64,
}

impl Write for Counted {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.file.write(data)?;
        self.hash.update(&data[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The beginning of a blob.
struct Partial {
    path: PathBuf,
    file: File,
    hash: Context,
    bytes: u64,
}

impl Partial {
    /// Opens a partial blob and hashes what it has. One that is too long starts again.
    fn open(path: PathBuf, bytes_max: u64) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut partial =
            Self { file: options.open(&path)?, path, hash: Context::new(&SHA256), bytes: 0 };
        if partial.file.metadata()?.len() > bytes_max {
            partial.restart()?;
        }
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = partial.file.read(&mut buffer)?;
            if length == 0 {
                return Ok(partial);
            }
            partial.hash.update(&buffer[..length]);
            partial.bytes += length as u64;
        }
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        (self.hash, self.bytes) = (Context::new(&SHA256), 0);
        Ok(())
    }

    fn add(&mut self, data: &[u8]) -> io::Result<()> {
        // A write that fails in part is written again at the same place by the next attempt.
        self.file.write_all_at(data, self.bytes)?;
        self.hash.update(data);
        self.bytes += data.len() as u64;
        Ok(())
    }
}

/// Fetches the rest of a blob from the registries that may have it.
async fn fetch_all(
    registries: &Registries,
    mut attempts: Attempts<Source>,
    blob: &Blob,
    partial: &mut Partial,
    progress: &dyn Progress,
) -> Result<(), RegistryError> {
    loop {
        match fetch(registries, attempts.server(), blob, partial, progress).await {
            Ok(()) => return Ok(()),
            Err(error) => attempts.next_after(error).await?,
        }
    }
}

/// Fetches the rest of a blob from one registry. Asks again at once as long as each connection
/// brings something.
async fn fetch(
    registries: &Registries,
    source: &Source,
    blob: &Blob,
    partial: &mut Partial,
    progress: &dyn Progress,
) -> Result<(), RegistryError> {
    loop {
        let before = partial.bytes;
        match fetch_once(registries, source, blob, partial, progress).await {
            Err(error) if error.is_transient() && partial.bytes >= before + PROGRESS_BYTES_MIN => {}
            result => return result,
        }
    }
}

async fn fetch_once(
    registries: &Registries,
    source: &Source,
    blob: &Blob,
    partial: &mut Partial,
    progress: &dyn Progress,
) -> Result<(), RegistryError> {
    if partial.bytes == blob.bytes {
        return Ok(());
    }
    let response = registries.blob(source, blob, partial.bytes).await?;
    if partial.bytes > 0 && !continues(&response, partial.bytes) {
        progress.remove(partial.bytes);
        blocking(|| partial.restart()).map_err(file_error("empty", &partial.path))?;
    }
    let mut body = response.into_body();
    while let Some(data) = next_data(source, &mut body).await? {
        if partial.bytes + data.len() as u64 > blob.bytes {
            let limit = usize::try_from(blob.bytes).unwrap_or(usize::MAX);
            return Err(HttpError::TooLong { host: source.server().to_owned(), limit }.into());
        }
        blocking(|| partial.add(&data)).map_err(file_error("write", &partial.path))?;
        progress.add(data.len() as u64);
    }
    if partial.bytes < blob.bytes {
        return Err(broken(source, io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(())
}

/// Whether a response is the rest of a blob from byte `from` on.
fn continues(response: &http::Response<Incoming>, from: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next());
    response.status() == StatusCode::PARTIAL_CONTENT
        && start.and_then(|start| start.parse().ok()) == Some(from)
}

/// Returns the next data of a body, or `None` at its end.
async fn next_data(source: &Source, body: &mut Incoming) -> Result<Option<Bytes>, RegistryError> {
    loop {
        let frame = timeout(STALL_LIMIT, body.frame()).await;
        match frame.map_err(|_| broken(source, io::ErrorKind::TimedOut.into()))? {
            None => return Ok(None),
            Some(Err(error)) => return Err(broken(source, io::Error::other(error))),
            // A frame that is no data has trailers.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

fn broken(source: &Source, error: io::Error) -> RegistryError {
    HttpError::Broken { host: source.server().to_owned(), source: error.into() }.into()
}

fn stalled(registry: &str) -> RegistryError {
    let source = io::Error::new(io::ErrorKind::TimedOut, "it sends too slowly");
    HttpError::Broken { host: registry.to_owned(), source: source.into() }.into()
}

fn file_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RegistryError + use<> {
    let path = path.to_owned();
    move |source| RegistryError::File { step, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_leftovers_stay_within_the_limit_and_used_blobs_in_any_case() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(directory.path());
        let make = |byte: u8| blobs.add(|to| to.write_all(&[byte; 64 << 10])).unwrap();
        let [used, old, new] = [1, 2, 3].map(make);
        let aged = File::options().write(true).open(blobs.path(&old)).unwrap();
        aged.set_modified(std::time::UNIX_EPOCH).unwrap();
        let partial = directory.path().join("partial/user-0");
        fs::write(&partial, [4; 1000]).unwrap();
        // A process was killed while it made a blob.
        let abandoned = directory.path().join("partial/new-0123");
        fs::write(&abandoned, [5; 1000]).unwrap();
        let is_there = || {
            let files = [blobs.path(&used), blobs.path(&old), blobs.path(&new), partial.clone()];
            files.map(|path| path.exists())
        };
        let of_image = BTreeSet::from([used.sha256.clone()]);

        assert_eq!(blobs.collect(&of_image, 100 << 10).unwrap(), 68 << 10);
        assert!(!abandoned.exists());
        assert_eq!(is_there(), [true, false, true, true]);

        assert_eq!(blobs.collect(&of_image, 0).unwrap(), 68 << 10);
        assert_eq!(is_there(), [true, false, false, false]);
    }
}
