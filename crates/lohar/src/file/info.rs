//! Facts about files: one, or all of a directory.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bhatti_proto::{
    AgentError, ErrorKind, FRAME_BYTES_MAX, FileInfo, FilePathRequest, FrameType, exit_payload,
};

use super::checked;
use crate::connection::{HostWriter, Transport};
use crate::limits::LISTING_ENTRIES_MAX;
use crate::refusal::{OpError, host_gone, io_refused, refused};

/// The JSON of one listing frame is closed before it would grow beyond this, in bytes.
const LISTING_FRAME_BYTES: usize = FRAME_BYTES_MAX / 2;

/// Room for the sentinel in an old host's one frame, in bytes.
const SENTINEL_BYTES: usize = 256;

/// Serves one `FILE_STAT_REQ`: follows links, and says where one leads.
pub(crate) async fn stat<T: Transport>(
    request: &FilePathRequest,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let metadata = fs::metadata(&path).map_err(|error| io_refused("stat", &path, &error))?;
    Ok(writer.send_json(FrameType::FILE_STAT_RESP, &describe(&path, &metadata)).await?)
}

/// Serves one `FILE_LS_REQ`: the entries by name, links not followed.
pub(crate) async fn list<T: Transport>(
    request: &FilePathRequest,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let entries = entries(&path)?;
    if request.all {
        for frame in frames(&entries)? {
            writer.send(FrameType::FILE_LS_RESP, &frame).await.map_err(host_gone)?;
        }
        return writer.send(FrameType::EXIT, &exit_payload(0)).await.map_err(host_gone);
    }
    let frame = one_frame(&entries)?;
    writer.send(FrameType::FILE_LS_RESP, &frame).await.map_err(host_gone)
}

fn entries(path: &Path) -> Result<Vec<FileInfo>, AgentError> {
    let failed = |error: &std::io::Error| io_refused("stat", path, error);
    if !fs::metadata(path).map_err(|error| failed(&error))?.is_dir() {
        return Err(refused(
            ErrorKind::NotDirectory,
            format!("{} is not a directory", path.display()),
        ));
    }
    let found = fs::read_dir(path).map_err(|error| failed(&error))?.flatten().filter_map(|entry| {
        // One that vanishes meanwhile was not there.
        let metadata = entry.path().symlink_metadata().ok()?;
        Some(describe(&entry.path(), &metadata))
    });
    let mut entries: Vec<FileInfo> = found.collect();
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(entries)
}

fn describe(path: &Path, metadata: &Metadata) -> FileInfo {
    let name = path.file_name().unwrap_or(path.as_os_str());
    FileInfo {
        name: name.to_string_lossy().into_owned(),
        size: i64::try_from(metadata.size()).unwrap_or(i64::MAX),
        mode: octal(metadata.mode()),
        is_dir: metadata.is_dir(),
        mtime: metadata.mtime(),
        symlink_target: fs::read_link(path)
            .ok()
            .map(|target| target.to_string_lossy().into_owned()),
    }
}

/// The permission bits as four octal digits.
pub(super) fn octal(mode: u32) -> String {
    format!("{:04o}", mode & 0o777)
}

/// All entries, as arrays that each fit a frame. An empty directory is one empty array.
fn frames(entries: &[FileInfo]) -> Result<Vec<Vec<u8>>, AgentError> {
    let mut frames = vec![b"[".to_vec()];
    for entry in entries {
        let json = json(entry)?;
        let frame = match frames.last_mut() {
            Some(frame) if frame.len() + json.len() < LISTING_FRAME_BYTES => frame,
            _ => {
                frames.push(b"[".to_vec());
                let last = frames.len() - 1;
                &mut frames[last]
            }
        };
        append(frame, &json);
    }
    frames.iter_mut().for_each(|frame| frame.push(b']'));
    Ok(frames)
}

/// As many entries as an old host takes, in one array; a sentinel behind them says if there are more.
fn one_frame(entries: &[FileInfo]) -> Result<Vec<u8>, AgentError> {
    let mut frame = b"[".to_vec();
    let mut taken = 0;
    for entry in entries.iter().take(LISTING_ENTRIES_MAX) {
        let json = json(entry)?;
        if frame.len() + json.len() + SENTINEL_BYTES > FRAME_BYTES_MAX {
            break;
        }
        append(&mut frame, &json);
        taken += 1;
    }
    if taken < entries.len() {
        let name = format!("... truncated at {taken} entries ({} total)", entries.len());
        let sentinel = FileInfo {
            name,
            size: 0,
            mode: String::new(),
            is_dir: false,
            mtime: 0,
            symlink_target: None,
        };
        append(&mut frame, &json(&sentinel)?);
    }
    frame.push(b']');
    Ok(frame)
}

fn append(frame: &mut Vec<u8>, json: &[u8]) {
    if frame.len() > 1 {
        frame.push(b',');
    }
    frame.extend_from_slice(json);
}

fn json(entry: &FileInfo) -> Result<Vec<u8>, AgentError> {
    serde_json::to_vec(entry).map_err(|error| refused(ErrorKind::Other, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(count: usize, name_length: usize) -> Vec<FileInfo> {
        let name = |number: usize| format!("{number:0name_length$}");
        let entry = |number| FileInfo {
            name: name(number),
            size: 1,
            mode: "0644".into(),
            is_dir: false,
            mtime: 1_700_000_000,
            symlink_target: None,
        };
        (0..count).map(entry).collect()
    }

    fn parse(frame: &[u8]) -> Vec<FileInfo> {
        assert!(frame.len() < FRAME_BYTES_MAX, "{} bytes", frame.len());
        serde_json::from_slice(frame).unwrap()
    }

    #[test]
    fn every_entry_comes_whatever_the_size() {
        for (count, name_length) in [(0, 1), (1, 1), (10_500, 20), (9_000, 250)] {
            let all = entries(count, name_length);

            let frames = frames(&all).unwrap();

            assert_eq!(frames.iter().flat_map(|frame| parse(frame)).collect::<Vec<_>>(), all);
        }
    }

    #[test]
    fn old_host_gets_one_frame_and_the_true_total() {
        let by_count = parse(&one_frame(&entries(10_500, 20)).unwrap());
        assert_eq!(by_count.len(), 10_001);
        assert_eq!(by_count[10_000].name, "... truncated at 10000 entries (10500 total)");

        let by_size = parse(&one_frame(&entries(9_000, 65)).unwrap());
        let sentinel = &by_size[by_size.len() - 1].name;
        assert_eq!(
            *sentinel,
            format!("... truncated at {} entries (9000 total)", by_size.len() - 1)
        );

        assert_eq!(parse(&one_frame(&entries(10_000, 5)).unwrap()).len(), 10_000);
    }
}
