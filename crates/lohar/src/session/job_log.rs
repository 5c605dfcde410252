//! The output of a job, on disk: two segments at most. When the newer one is full, the older one
//! is removed.
//!
//! A segment is a file of records: stream (1 byte), length (4 bytes, big-endian), bytes. Files
//! are unlinked as soon as they are open, so nothing is left of a job when its log is dropped or
//! the agent ends, even if the agent is killed.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bhatti_proto::FrameType;

use super::output::Piece;
use crate::log;

const RECORD_HEADER_BYTES: usize = 5;

/// The distance between marks, in bytes. A read begins its search at the mark before its offset.
const MARK_BYTES: u64 = 64 * 1024;

/// The output between two offsets.
#[derive(Debug)]
struct Segment {
    file: File,
    start: u64,
    end: u64,
    file_end: u64,
    /// Offsets of some records in the output, and their offsets in the file.
    marks: Vec<(u64, u64)>,
}

/// A job's output.
#[derive(Debug)]
pub(super) struct JobLog {
    directory: PathBuf,
    name: String,
    segment_bytes: u64,
    segments: VecDeque<Segment>,
    end: u64,
}

impl JobLog {
    /// Creates an empty log that keeps at least half of `limit_bytes`, and at most `limit_bytes`.
    pub(super) fn create(directory: &Path, name: &str, limit_bytes: u64) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let mut log = Self {
            directory: directory.to_owned(),
            name: name.to_owned(),
            segment_bytes: (limit_bytes / 2).max(1),
            segments: VecDeque::new(),
            end: 0,
        };
        log.begin_segment()?;
        Ok(log)
    }

    pub(super) fn start(&self) -> u64 {
        self.segments.front().map_or(self.end, |segment| segment.start)
    }

    pub(super) const fn end(&self) -> u64 {
        self.end
    }

    /// The number of bytes before the end that are kept, regardless of the next append.
    pub(super) const fn kept_for_sure(&self) -> u64 {
        self.segment_bytes
    }

    /// Appends output. If the disk does not take it, that output is lost, and the log begins
    /// after it.
    pub(super) fn append(&mut self, frame_type: FrameType, bytes: &[u8]) {
        if let Err(error) = self.try_append(frame_type, bytes) {
            log::line(format_args!("failed to keep output of the job {}: {error}", self.name));
            self.segments.clear();
            self.end += bytes.len() as u64;
            // If this fails, too, the next append tries again.
            drop(self.begin_segment());
        }
    }

    fn try_append(&mut self, frame_type: FrameType, bytes: &[u8]) -> io::Result<()> {
        let full = |segment: &Segment| {
            segment.end - segment.start + bytes.len() as u64 > self.segment_bytes
        };
        if self.segments.back().is_none_or(|segment| segment.end > segment.start && full(segment)) {
            self.begin_segment()?;
        }
        let segment = self.segments.back_mut().ok_or(io::ErrorKind::NotFound)?;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + bytes.len());
        record.push(frame_type.0);
        record.extend_from_slice(&length.to_be_bytes());
        record.extend_from_slice(bytes);
        segment.file.write_all(&record)?;
        if segment.marks.last().is_none_or(|(place, _)| segment.end - place >= MARK_BYTES) {
            segment.marks.push((segment.end, segment.file_end));
        }
        segment.end += u64::from(length);
        segment.file_end += record.len() as u64;
        self.end = segment.end;
        Ok(())
    }

    fn begin_segment(&mut self) -> io::Result<()> {
        // The oldest file frees its space before the new file takes any.
        if self.segments.len() >= 2 {
            self.segments.pop_front();
        }
        let path = self.directory.join(format!("{}.{}", self.name, self.end));
        let file = File::options().create_new(true).read(true).append(true).open(&path)?;
        fs::remove_file(&path)?;
        self.segments.push_back(Segment {
            file,
            start: self.end,
            end: self.end,
            file_end: 0,
            marks: Vec::new(),
        });
        Ok(())
    }

    /// Returns the next piece at or after `from`, of one stream.
    pub(super) fn read(&self, from: u64) -> Option<Piece> {
        let segment = self.segments.iter().find(|segment| segment.end > from)?;
        // Unreadable output is as good as lost.
        segment.read(from.max(segment.start)).ok()
    }
}

impl Segment {
    fn read(&self, from: u64) -> io::Result<Piece> {
        let mark = self.marks.partition_point(|(place, _)| *place <= from).saturating_sub(1);
        let (mut place, mut at) = self.marks.get(mark).copied().ok_or(io::ErrorKind::NotFound)?;
        loop {
            let mut header = [0; RECORD_HEADER_BYTES];
            self.file.read_exact_at(&mut header, at)?;
            let length =
                u64::from(u32::from_be_bytes([header[1], header[2], header[3], header[4]]));
            if from < place + length {
                let skipped = from - place;
                let wanted = usize::try_from(length - skipped).map_err(io::Error::other)?;
                let mut bytes = vec![0; wanted];
                self.file.read_exact_at(&mut bytes, at + RECORD_HEADER_BYTES as u64 + skipped)?;
                return Ok(Piece {
                    frame_type: FrameType(header[0]),
                    bytes: bytes.into(),
                    at: from,
                });
            }
            place += length;
            at += RECORD_HEADER_BYTES as u64 + length;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(limit: u64) -> (tempfile::TempDir, JobLog) {
        let directory = tempfile::tempdir().unwrap();
        let log = JobLog::create(directory.path(), "job", limit).unwrap();
        (directory, log)
    }

    /// Returns the output from an offset on, as (stream, bytes), with adjacent pieces of one
    /// stream joined.
    fn all(log: &JobLog, from: u64) -> Vec<(u8, Vec<u8>)> {
        let (mut at, mut found) = (from, Vec::<(u8, Vec<u8>)>::new());
        while let Some(piece) = log.read(at) {
            at = piece.at + piece.bytes.len() as u64;
            match found.last_mut() {
                Some((stream, bytes)) if *stream == piece.frame_type.0 => {
                    bytes.extend_from_slice(&piece.bytes);
                }
                _ => found.push((piece.frame_type.0, piece.bytes.to_vec())),
            }
        }
        found
    }

    #[test]
    fn output_is_read_from_any_byte() {
        let (_directory, mut log) = log(1000);
        log.append(FrameType::STDOUT, b"hello ");
        log.append(FrameType::STDERR, b"oops");
        log.append(FrameType::STDOUT, b"world");

        assert_eq!(
            all(&log, 0),
            [(2, b"hello ".to_vec()), (3, b"oops".to_vec()), (2, b"world".to_vec())]
        );
        assert_eq!(all(&log, 8), [(3, b"ps".to_vec()), (2, b"world".to_vec())]);
        assert_eq!(all(&log, 15), []);
        assert_eq!((log.start(), log.end()), (0, 15));
    }

    #[test]
    fn old_output_is_removed_and_the_newer_half_stays() {
        let (_directory, mut log) = log(2000);
        for number in 0..1000u32 {
            log.append(FrameType::STDOUT, format!("{number:010}").as_bytes());
        }

        assert_eq!(log.end(), 10_000);
        assert!(log.end() - log.start() >= 1000 && log.end() - log.start() <= 2000);
        let kept = all(&log, 0).remove(0).1;
        assert_eq!(kept.len() as u64, log.end() - log.start());
        assert!(kept.ends_with(b"0000000999"));
    }

    #[test]
    fn long_output_is_found_by_its_marks() {
        let (_directory, mut log) = log(64 << 20);
        let chunk: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        for _ in 0..300 {
            log.append(FrameType::STDOUT, &chunk);
        }

        for place in [0, 9_999, 10_000, 1_234_567, 2_999_999] {
            let piece = log.read(place).unwrap();
            assert_eq!(piece.at, place);
            let within = usize::try_from(place % 10_000).unwrap();
            assert_eq!(piece.bytes, chunk[within..]);
        }
    }

    #[test]
    fn log_leaves_no_file_in_its_directory() {
        let (directory, mut log) = log(1000);
        log.append(FrameType::STDOUT, b"secret");

        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
