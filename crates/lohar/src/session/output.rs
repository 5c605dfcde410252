//! The output of a session.

use bhatti_proto::{CHUNK_BYTES, FrameType};
use bytes::Bytes;

use super::job_log::JobLog;
use crate::ring::{RING_BYTES, Ring};

/// The kept output of a session.
#[derive(Debug)]
pub(super) enum Output {
    /// A terminal's one stream, in memory.
    Ring(Ring),
    /// A job's two streams, on disk.
    Log(JobLog),
}

/// A piece of one stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) frame_type: FrameType,
    pub(super) bytes: Bytes,
    /// The offset of its first byte. Later than requested if the bytes there are no longer kept.
    pub(super) at: u64,
}

impl Output {
    /// The offset of the first byte that is kept.
    pub(super) fn start(&self) -> u64 {
        match self {
            Self::Ring(ring) => ring.start(),
            Self::Log(log) => log.start(),
        }
    }

    /// The offset after the last byte.
    pub(super) const fn end(&self) -> u64 {
        match self {
            Self::Ring(ring) => ring.end(),
            Self::Log(log) => log.end(),
        }
    }

    pub(super) fn append(&mut self, frame_type: FrameType, bytes: &[u8]) {
        match self {
            Self::Ring(ring) => ring.write(bytes),
            Self::Log(log) => log.append(frame_type, bytes),
        }
    }

    /// Returns the next piece at or after `from`, or `None` if there is none yet.
    pub(super) fn read(&mut self, from: u64) -> Option<Piece> {
        match self {
            Self::Ring(ring) => {
                let at = from.max(ring.start());
                let (first, second) = ring.read(at);
                let bytes = Bytes::from([first, second].concat());
                (!bytes.is_empty()).then_some(Piece { frame_type: FrameType::STDOUT, bytes, at })
            }
            Self::Log(log) => log.read(from),
        }
    }

    /// Whether another chunk can be appended without discarding bytes from `position` on.
    pub(super) fn has_room_behind(&self, position: u64) -> bool {
        let kept = match self {
            Self::Ring(_) => RING_BYTES as u64,
            Self::Log(log) => log.kept_for_sure(),
        };
        self.end() + CHUNK_BYTES as u64 <= position + kept
    }
}
