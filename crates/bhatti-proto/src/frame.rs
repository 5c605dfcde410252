//! The frame codec.
//!
//! ```text
//!  0       3   4      5                4 + L
//!  ┌─────────┬──────┬──────────────────┐
//!  │ L (u32) │ type │ payload          │     L = 1 + payload length, big-endian
//!  └─────────┴──────┴──────────────────┘
//! ```

use std::fmt;

/// The largest `L`: type byte plus payload, in bytes.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// The largest payload, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = FRAME_BYTES_MAX - 1;

/// Length field and type byte, in bytes.
const HEADER_BYTES: usize = 5;

/// The type of a frame. Unknown types are kept as they are: the receiver decides about them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameType(pub u8);

impl FrameType {
    /// Host to guest: bytes for the process, or for the file being written. Both ways: bytes of a
    /// connection that is relayed as frames.
    pub const STDIN: Self = Self(0x01);
    /// Guest to host: standard output of the process, or bytes of the file being read.
    pub const STDOUT: Self = Self(0x02);
    /// Guest to host: standard error of the process.
    pub const STDERR: Self = Self(0x03);
    /// Host to guest: rows and columns of the terminal.
    pub const RESIZE: Self = Self(0x04);
    /// Guest to host: the exit code; the operation is over.
    pub const EXIT: Self = Self(0x05);
    /// Both ways: an error text for people; the operation is over.
    pub const ERROR: Self = Self(0x06);
    /// Host to guest: kill the process group.
    pub const KILL: Self = Self(0x07);
    /// Host to guest: end of the process's standard input. Both ways: end of one direction of a
    /// connection. Not in the original protocol.
    pub const STDIN_EOF: Self = Self(0x08);
    /// Host to guest: one byte, the signal to send to the process group. Not in the original
    /// protocol.
    pub const SIGNAL: Self = Self(0x09);
    /// Guest to host: [`AgentError`](crate::AgentError) in place of [`ERROR`](Self::ERROR), for
    /// hosts that ask for it with `error_details`. Not in the original protocol.
    pub const ERROR_DETAILS: Self = Self(0x0a);
    /// Guest to host: the command reached its time limit and is being ended; [`EXIT`](Self::EXIT)
    /// follows. Not in the original protocol.
    pub const TIMEOUT: Self = Self(0x0b);
    /// Guest to host: the command runs. Sent to hosts that ask for `error_details`. Not in the
    /// original protocol.
    pub const STARTED: Self = Self(0x0c);
    /// Host to guest: [`ExecRequest`](crate::ExecRequest).
    pub const EXEC_REQ: Self = Self(0x10);
    /// Host to guest: the token, as raw bytes.
    pub const AUTH: Self = Self(0x11);
    /// Host to guest: [`ForwardRequest`](crate::ForwardRequest).
    pub const FWD_REQ: Self = Self(0x20);
    /// Guest to host: [`ForwardResponse`](crate::ForwardResponse).
    pub const FWD_RESP: Self = Self(0x21);
    /// Host to guest: list the sessions.
    pub const EXEC_LIST_REQ: Self = Self(0x30);
    /// Guest to host: an array of [`SessionInfo`](crate::SessionInfo).
    pub const EXEC_LIST_RESP: Self = Self(0x31);
    /// Host to guest: [`SessionRef`](crate::SessionRef), the session to kill.
    pub const EXEC_KILL: Self = Self(0x32);
    /// Guest to host: [`SessionInfo`](crate::SessionInfo).
    pub const SESSION_INFO: Self = Self(0x33);
    /// Host to guest: [`SignalRequest`](crate::SignalRequest). Answered by
    /// [`EXIT`](Self::EXIT) 0. Not in the original protocol.
    pub const SIGNAL_REQ: Self = Self(0x34);
    /// Host to guest: ask for the activity.
    pub const ACTIVITY_REQ: Self = Self(0x40);
    /// Guest to host: [`ActivityInfo`](crate::ActivityInfo).
    pub const ACTIVITY_RESP: Self = Self(0x41);
    /// Host to guest: ask for events as they happen. Not in the original protocol.
    pub const EVENTS_REQ: Self = Self(0x42);
    /// Guest to host: [`GuestEvent`](crate::GuestEvent). Not in the original protocol.
    pub const EVENT: Self = Self(0x43);
    /// Host to guest: ask for the load. Not in the original protocol.
    pub const LOAD_REQ: Self = Self(0x44);
    /// Guest to host: [`LoadInfo`](crate::LoadInfo). Not in the original protocol.
    pub const LOAD_RESP: Self = Self(0x45);
    /// Host to guest: [`FileReadRequest`](crate::FileReadRequest).
    pub const FILE_READ_REQ: Self = Self(0x50);
    /// Guest to host: [`FileReadResponse`](crate::FileReadResponse).
    pub const FILE_READ_RESP: Self = Self(0x51);
    /// Host to guest: [`FileWriteRequest`](crate::FileWriteRequest).
    pub const FILE_WRITE_REQ: Self = Self(0x52);
    /// Guest to host: [`StatusOk`](crate::StatusOk).
    pub const FILE_WRITE_RESP: Self = Self(0x53);
    /// Host to guest: [`FilePathRequest`](crate::FilePathRequest).
    pub const FILE_STAT_REQ: Self = Self(0x54);
    /// Guest to host: [`FileInfo`](crate::FileInfo).
    pub const FILE_STAT_RESP: Self = Self(0x55);
    /// Host to guest: [`FilePathRequest`](crate::FilePathRequest).
    pub const FILE_LS_REQ: Self = Self(0x56);
    /// Guest to host: an array of [`FileInfo`](crate::FileInfo).
    pub const FILE_LS_RESP: Self = Self(0x57);
    /// Host to guest: [`MkdirRequest`](crate::MkdirRequest). This request and the next two are
    /// answered by [`EXIT`](Self::EXIT) 0. Not in the original protocol.
    pub const FILE_MKDIR_REQ: Self = Self(0x58);
    /// Host to guest: [`RemoveRequest`](crate::RemoveRequest). Not in the original protocol.
    pub const FILE_REMOVE_REQ: Self = Self(0x59);
    /// Host to guest: [`RenameRequest`](crate::RenameRequest). Not in the original protocol.
    pub const FILE_RENAME_REQ: Self = Self(0x5a);
    /// Host to guest: [`FilePathRequest`](crate::FilePathRequest), the file or directory to
    /// watch. Not in the original protocol.
    pub const FILE_WATCH_REQ: Self = Self(0x5b);
    /// Guest to host: [`FileEvent`](crate::FileEvent). Not in the original protocol.
    pub const FILE_EVENT: Self = Self(0x5c);
    /// Host to guest: [`ArchiveRequest`](crate::ArchiveRequest), a directory to read as a tar
    /// archive. Answered by the archive as [`STDOUT`](Self::STDOUT), one [`STDERR`](Self::STDERR)
    /// with the path of each skipped entry, and [`EXIT`](Self::EXIT) 0. Not in the original
    /// protocol.
    pub const ARCHIVE_READ_REQ: Self = Self(0x5d);
    /// Host to guest: [`ArchiveRequest`](crate::ArchiveRequest), a directory to unpack a tar
    /// archive into. The archive follows as [`STDIN`](Self::STDIN) and
    /// [`STDIN_EOF`](Self::STDIN_EOF). Answered like
    /// [`ARCHIVE_READ_REQ`](Self::ARCHIVE_READ_REQ), without an archive. Not in the original
    /// protocol.
    pub const ARCHIVE_WRITE_REQ: Self = Self(0x5e);
    /// Host to guest: shut the guest down. Answered by [`EXIT`](Self::EXIT) 0. Not in the
    /// original protocol.
    pub const SHUTDOWN_REQ: Self = Self(0x60);
    /// Host to guest: [`GuestConfig`](crate::GuestConfig), once after the boot. Answered by
    /// [`EXIT`](Self::EXIT) 0. Not in the original protocol.
    pub const CONFIG_REQ: Self = Self(0x61);
    /// Host to guest: [`Identity`](crate::Identity), once after each restore as another sandbox.
    /// Not in the original protocol.
    pub const IDENTITY_REQ: Self = Self(0x62);
    /// Guest to host: [`IdentityReport`](crate::IdentityReport). Not in the original protocol.
    pub const IDENTITY_RESP: Self = Self(0x63);
    /// Host to guest: [`Suspend`](crate::Suspend), before a snapshot. From the answer on, no user
    /// process runs until the host sends [`WOKEN_REQ`](Self::WOKEN_REQ) or
    /// [`IDENTITY_REQ`](Self::IDENTITY_REQ). This request and the next one are answered by
    /// [`EXIT`](Self::EXIT) 0. Not in the original protocol.
    pub const SUSPEND_REQ: Self = Self(0x64);
    /// Host to guest: [`Woken`](crate::Woken), after each pause or restore of the same sandbox.
    /// Not in the original protocol.
    pub const WOKEN_REQ: Self = Self(0x65);
    /// Host to guest: [`GuestInit`](crate::GuestInit), after the host has written the files that
    /// were too large for the configuration. Answered by [`EXIT`](Self::EXIT) 0. Not in the
    /// original protocol.
    pub const INIT_REQ: Self = Self(0x66);
    /// Host to guest: [`EntryRequest`](crate::EntryRequest). Answered by
    /// [`ENTRIES`](Self::ENTRIES), once or more often, and [`EXIT`](Self::EXIT) 0. Not in the
    /// original protocol.
    pub const ENTRY_REQ: Self = Self(0x70);
    /// Guest to host: an array of [`Entry`](crate::Entry). Not in the original protocol.
    pub const ENTRIES: Self = Self(0x71);
    /// Host to guest: [`EntryRequest`](crate::EntryRequest), a path to resolve. The file need not
    /// exist. Not in the original protocol.
    pub const PLACE_REQ: Self = Self(0x72);
    /// Guest to host: [`Place`](crate::Place). Not in the original protocol.
    pub const PLACE_RESP: Self = Self(0x73);
    /// Host to guest: [`TreeWatchRequest`](crate::TreeWatchRequest). Not in the original protocol.
    pub const TREE_WATCH_REQ: Self = Self(0x74);
    /// Both ways: see [`TreeWatchRequest`](crate::TreeWatchRequest). Not in the original protocol.
    pub const SYNC: Self = Self(0x75);
}

impl fmt::Display for FrameType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:02x}", self.0)
    }
}

impl fmt::Debug for FrameType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes are not a frame, or a payload does not fit in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// `L` is over [`FRAME_BYTES_MAX`].
    #[error("frame too large: {length} > {FRAME_BYTES_MAX}")]
    TooLarge {
        /// `L`.
        length: usize,
    },
    /// `L` is zero.
    #[error("invalid frame: length is 0")]
    Empty,
}

/// A frame found at the start of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed<'a> {
    /// The frame's type.
    pub frame_type: FrameType,
    /// The frame's payload.
    pub payload: &'a [u8],
    /// The bytes that the frame takes in the buffer, header included.
    pub total_bytes: usize,
}

/// Appends one frame to `buffer`.
///
/// # Errors
///
/// Returns [`FrameError::TooLarge`], with `buffer` unchanged, if `payload` is longer than
/// [`PAYLOAD_BYTES_MAX`].
pub fn encode(
    buffer: &mut Vec<u8>,
    frame_type: FrameType,
    payload: &[u8],
) -> Result<(), FrameError> {
    let length = payload.len() + 1;
    let field = u32::try_from(length).ok().filter(|_| length <= FRAME_BYTES_MAX);
    let field = field.ok_or(FrameError::TooLarge { length })?;
    buffer.reserve(HEADER_BYTES + payload.len());
    buffer.extend_from_slice(&field.to_be_bytes());
    buffer.push(frame_type.0);
    buffer.extend_from_slice(payload);
    Ok(())
}

/// Finds the frame at the start of `buffer`, without consuming it. Returns `None` if more bytes
/// are needed.
///
/// # Errors
///
/// Returns an error as soon as the length field is there and is not valid for any frame.
pub fn parse(buffer: &[u8]) -> Result<Option<Parsed<'_>>, FrameError> {
    let Some((field, rest)) = buffer.split_first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*field) as usize;
    if length == 0 {
        return Err(FrameError::Empty);
    }
    if length > FRAME_BYTES_MAX {
        return Err(FrameError::TooLarge { length });
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    Ok(Some(Parsed {
        frame_type: FrameType(body[0]),
        payload: &body[1..],
        total_bytes: 4 + length,
    }))
}

/// Returns the payload of [`FrameType::RESIZE`].
#[must_use]
pub fn resize_payload(rows: u16, cols: u16) -> [u8; 4] {
    let (rows, cols) = (rows.to_be_bytes(), cols.to_be_bytes());
    [rows[0], rows[1], cols[0], cols[1]]
}

/// Returns rows and columns of [`FrameType::RESIZE`], or `None` if the payload is shorter than
/// four bytes. Further bytes are ignored.
#[must_use]
pub fn parse_resize(payload: &[u8]) -> Option<(u16, u16)> {
    let [r0, r1, c0, c1] = *payload.first_chunk::<4>()?;
    Some((u16::from_be_bytes([r0, r1]), u16::from_be_bytes([c0, c1])))
}

/// Returns the payload of [`FrameType::EXIT`].
#[must_use]
pub const fn exit_payload(code: i32) -> [u8; 4] {
    code.to_be_bytes()
}

/// In the place of the signal in [`FrameType::EXIT`] of a session: the process runs on, and another
/// client has taken the session over. The code is then 0.
pub const TAKEN_OVER: u8 = 0;

/// Returns the payload of [`FrameType::EXIT`] of a session: the code, and the signal that ended the
/// process, if one did, or [`TAKEN_OVER`].
#[must_use]
pub fn session_exit_payload(code: i32, signal: Option<u8>) -> Vec<u8> {
    let mut payload = exit_payload(code).to_vec();
    payload.extend(signal);
    payload
}

/// Returns the signal that ended a session's process, if the payload of [`FrameType::EXIT`] has
/// one.
#[must_use]
pub fn parse_exit_signal(payload: &[u8]) -> Option<u8> {
    payload.get(4).copied()
}

/// Returns the code of [`FrameType::EXIT`], or `None` if the payload is shorter than four bytes.
/// Further bytes are ignored.
#[must_use]
pub fn parse_exit(payload: &[u8]) -> Option<i32> {
    payload.first_chunk::<4>().map(|bytes| i32::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests;
