//! The protocol between host and guest agent: frames, messages, and the channel that carries them.
//!
//! ```text
//!  frame      one operation's requests, output and result         (every engine)
//!  mux        many streams over one connection, one per operation  (virtio-serial)
//!  resync     a fresh start on every host connect                  (virtio-serial)
//! ```
//!
//! Where the engine gives a connection per operation (vsock, Unix sockets), frames travel on it
//! directly. The codec, the messages and the resync state machines do no I/O; [`FrameReader`],
//! [`FrameWriter`] and [`mux`] are the thin asynchronous layer on top.
//!
//! Frames and messages are those of the original system, byte for byte. Additions are new frame
//! types or optional keys, so that old and new peers understand each other.

mod batch;
mod entry;
mod frame;
mod guest;
mod io;
mod message;
pub mod mux;
mod relay;
pub mod resync;

pub use entry::{Entry, EntryKind, EntryRequest, InPlace, Place, TreeWatchRequest};
pub use frame::{FRAME_BYTES_MAX, FrameError, FrameType, PAYLOAD_BYTES_MAX, Parsed, encode, parse};
pub use frame::{
    TAKEN_OVER, exit_payload, parse_exit, parse_exit_signal, parse_resize, resize_payload,
    session_exit_payload,
};
pub use guest::{
    Applied, ConfigFile, ConfigVolume, GuestConfig, GuestInit, GuestNetwork, Identity,
    IdentityReport, Suspend, Woken,
};
pub use io::{Frame, FrameReader, FrameWriter, ReadFrameError, SendJsonError};
pub use message::{
    ActivityInfo, AgentError, ArchiveRequest, ErrorKind, ExecRequest, FileEvent, FileEventKind,
    FileInfo, FilePathRequest, FileReadRequest, FileReadResponse, FileWriteRequest, ForwardRequest,
    ForwardResponse, GuestEvent, InputEnd, ListRequest, LoadInfo, MkdirRequest, RemoveRequest,
    RenameRequest, SessionInfo, SessionRef, SignalRequest, StatusOk,
};
pub use relay::relay_as_frames;

/// The port of the agent's control service, on vsock, TCP and the multiplexed channel.
pub const CONTROL_PORT: u32 = 1024;

/// The port of the agent's TCP forwarding service.
pub const FORWARD_PORT: u32 = 1025;

/// The kernel parameter that tells the agent to wait until the root disk has a file system.
pub const AWAIT_ROOT: &str = "BHATTI_AWAIT_ROOT";

/// What the agent writes to the console when it begins to wait for the root disk.
pub const AWAITING_ROOT: &str = "waiting for a root disk with a file system";

/// The size of the pieces in which output and files are sent, in bytes.
pub const CHUNK_BYTES: usize = 32 * 1024;

/// The longest piece of output or of a file that a host accepts, in bytes. No agent sends longer
/// ones.
pub const PIECE_BYTES_MAX: usize = 2 * CHUNK_BYTES;

pub(crate) const fn is_false(value: &bool) -> bool {
    !*value
}
