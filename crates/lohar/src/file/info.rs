//! Facts about files: one, or all of a directory.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bhatti_proto::{
    AgentError, ErrorKind, FRAME_BYTES_MAX, FileInfo, FilePathRequest, FrameType, exit_payload,
};
use tokio::sync::mpsc;

use super::{checked, octal, worker};
use crate::Agent;
use crate::connection::{HostWriter, Transport};
use crate::limits::LISTING_ENTRIES_MAX;
use crate::refusal::{OpError, host_gone, io_refused, refused};

/// The largest listing frame, in bytes of JSON: an entry that would exceed this begins the next
/// frame. Only one frame of the listing is in memory at a time.
pub(super) const LISTING_FRAME_BYTES: usize = 64 << 10;

/// Room for the sentinel in an old host's one frame, in bytes.
const SENTINEL_BYTES: usize = 256;

/// Serves one `FILE_STAT_REQ`: follows links, and reports the target of a link.
pub(crate) async fn stat<T: Transport>(
    agent: &Agent,
    request: &FilePathRequest,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let look = move || {
        let metadata = fs::metadata(&path).map_err(|error| io_refused("stat", &path, &error))?;
        Ok(describe(&path, &metadata, fs::read_link(&path).ok().as_deref()))
    };
    let info = worker::begin(agent, request.user.as_deref(), look).await?.end().await?;
    Ok(writer.send_json(FrameType::FILE_STAT_RESP, &info).await?)
}

/// Serves one `FILE_LS_REQ`: lists the entries of a directory, without following links. A host
/// that takes all entries gets them in the directory's order. An old host, which takes one frame,
/// gets the first entries by name.
pub(crate) async fn list<T: Transport>(
    agent: &Agent,
    request: &FilePathRequest,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let all = request.all;
    let (sender, mut frames) = mpsc::channel::<Vec<u8>>(1);
    let listing = move || {
        let mut send = |frame| sender.blocking_send(frame).is_ok();
        if all { send_all(&path, &mut send) } else { send_first(&path, &mut send) }
    };
    let mut listing = worker::begin(agent, request.user.as_deref(), listing).await?;
    while let Some(frame) = frames.recv().await {
        writer.send(FrameType::FILE_LS_RESP, &frame).await.map_err(host_gone)?;
    }
    listing.end().await?;
    if all {
        writer.send(FrameType::EXIT, &exit_payload(0)).await.map_err(host_gone)?;
    }
    Ok(())
}

/// Sends all entries in frames, until the receiver is gone. Sends a full frame when the next
/// entry is found, and the last frame at the end. An empty directory is one empty array.
fn send_all(path: &Path, send: &mut impl FnMut(Vec<u8>) -> bool) -> Result<(), AgentError> {
    let mut frame = Frame::default();
    for entry in read_directory(path)? {
        // Skip an entry that has been removed meanwhile.
        let Some(info) = describe_entry(&entry) else { continue };
        let json = json(&info)?;
        if !frame.is_empty() && frame.len() + json.len() > LISTING_FRAME_BYTES {
            let full = std::mem::take(&mut frame);
            if !send(full.close()) {
                return Ok(());
            }
        }
        frame.append(&json);
    }
    send(frame.close());
    Ok(())
}

/// Sends the first entries by name, as many as an old host takes. If there are more, a sentinel
/// at the end says so.
fn send_first(path: &Path, send: &mut impl FnMut(Vec<u8>) -> bool) -> Result<(), AgentError> {
    let (mut names, mut total) = (BTreeSet::new(), 0);
    for entry in read_directory(path)? {
        total += 1;
        names.insert(entry.file_name());
        if names.len() > LISTING_ENTRIES_MAX {
            names.pop_last();
        }
    }
    let (mut frame, mut taken) = (Frame::default(), 0);
    for name in &names {
        let entry = path.join(name);
        let Ok(metadata) = entry.symlink_metadata() else { continue };
        let json = json(&describe(&entry, &metadata, link_target(&entry, &metadata).as_deref()))?;
        if frame.len() + json.len() + SENTINEL_BYTES > FRAME_BYTES_MAX {
            break;
        }
        frame.append(&json);
        taken += 1;
    }
    if taken < total {
        let sentinel = FileInfo {
            name: format!("... truncated at {taken} entries ({total} total)"),
            size: 0,
            mode: String::new(),
            is_dir: false,
            mtime: 0,
            symlink_target: None,
        };
        frame.append(&json(&sentinel)?);
    }
    send(frame.close());
    Ok(())
}

fn read_directory(path: &Path) -> Result<impl Iterator<Item = DirEntry>, AgentError> {
    let failed = |error: &io::Error| io_refused("stat", path, error);
    if !fs::metadata(path).map_err(|error| failed(&error))?.is_dir() {
        return Err(refused(
            ErrorKind::NotDirectory,
            format!("{} is not a directory", path.display()),
        ));
    }
    Ok(fs::read_dir(path).map_err(|error| failed(&error))?.flatten())
}

fn describe_entry(entry: &DirEntry) -> Option<FileInfo> {
    // Of the entry itself, without following a link.
    let (path, metadata) = (entry.path(), entry.metadata().ok()?);
    Some(describe(&path, &metadata, link_target(&path, &metadata).as_deref()))
}

fn link_target(path: &Path, metadata: &Metadata) -> Option<std::path::PathBuf> {
    metadata.is_symlink().then(|| fs::read_link(path).ok())?
}

fn describe(path: &Path, metadata: &Metadata, link_target: Option<&Path>) -> FileInfo {
    let name = path.file_name().unwrap_or(path.as_os_str());
    FileInfo {
        name: name.to_string_lossy().into_owned(),
        size: i64::try_from(metadata.size()).unwrap_or(i64::MAX),
        mode: octal(metadata.mode()),
        is_dir: metadata.is_dir(),
        mtime: metadata.mtime(),
        symlink_target: link_target.map(|target| target.to_string_lossy().into_owned()),
    }
}

fn json(entry: &FileInfo) -> Result<Vec<u8>, AgentError> {
    serde_json::to_vec(entry).map_err(|error| refused(ErrorKind::Other, error.to_string()))
}

/// A JSON array under construction, for one frame.
#[derive(Debug, Default)]
pub(super) struct Frame(Vec<u8>);

impl Frame {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn append(&mut self, json: &[u8]) {
        self.0.push(if self.0.is_empty() { b'[' } else { b',' });
        self.0.extend_from_slice(json);
    }

    pub(super) fn close(mut self) -> Vec<u8> {
        if self.0.is_empty() {
            self.0.push(b'[');
        }
        self.0.push(b']');
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// A directory in memory: ten thousand new names can make a disk's journal wait for seconds.
    fn directory_with(count: usize, name_length: usize) -> (tempfile::TempDir, Vec<String>) {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let names: Vec<_> = (0..count).map(|number| format!("{number:0name_length$}")).collect();
        for name in &names {
            File::create(directory.path().join(name)).unwrap();
        }
        (directory, names)
    }

    fn sent(
        send: impl FnOnce(&mut dyn FnMut(Vec<u8>) -> bool) -> Result<(), AgentError>,
    ) -> Vec<Vec<FileInfo>> {
        let mut frames = Vec::new();
        send(&mut |frame: Vec<u8>| {
            assert!(frame.len() < FRAME_BYTES_MAX, "{} bytes", frame.len());
            frames.push(serde_json::from_slice(&frame).unwrap());
            true
        })
        .unwrap();
        frames
    }

    #[test]
    fn every_entry_is_sent_for_any_number_and_name_length() {
        for (count, name_length) in [(0, 1), (1, 1), (10_500, 20), (9_000, 250)] {
            let (directory, expected) = directory_with(count, name_length);

            let frames = sent(|mut send| send_all(directory.path(), &mut send));

            let mut names: Vec<_> = frames.into_iter().flatten().map(|entry| entry.name).collect();
            names.sort();
            assert!(names == expected, "{count} names of {name_length} bytes");
        }
    }

    #[test]
    fn listing_ends_when_its_receiver_is_gone() {
        let (directory, _names) = directory_with(5_000, 100);
        let mut frames = 0;

        send_all(directory.path(), &mut |_| {
            frames += 1;
            false
        })
        .unwrap();

        assert_eq!(frames, 1);
    }

    #[test]
    fn old_host_gets_one_frame_and_the_true_total() {
        let first = |count, name_length| {
            let (directory, _names) = directory_with(count, name_length);
            sent(|mut send| send_first(directory.path(), &mut send)).remove(0)
        };
        let by_count = first(10_500, 20);
        assert_eq!(by_count.len(), 10_001);
        assert_eq!(by_count[0].name, format!("{:020}", 0));
        assert_eq!(by_count[10_000].name, "... truncated at 10000 entries (10500 total)");

        let by_size = first(9_000, 65);
        let sentinel = &by_size[by_size.len() - 1].name;
        assert_eq!(
            *sentinel,
            format!("... truncated at {} entries (9000 total)", by_size.len() - 1)
        );

        assert_eq!(first(10_000, 5).len(), 10_000);
    }
}
