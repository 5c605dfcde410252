//! Any bytes are one of the JSON messages or an error; what was decoded is the same after another round.
#![no_main]

use bhatti_proto::{
    ActivityInfo, AgentError, ExecRequest, FileEvent, FileInfo, FilePathRequest, FileReadRequest, FileReadResponse,
    FileWriteRequest, ForwardRequest, ForwardResponse, GuestConfig, GuestEvent, Identity, IdentityReport, MkdirRequest,
    RemoveRequest, RenameRequest, SessionInfo, SessionRef, SignalRequest, StatusOk, Suspend, Woken,
};
use libfuzzer_sys::fuzz_target;

macro_rules! check {
    ($bytes:expr, $($message:ty),* $(,)?) => {$(
        if let Ok(message) = serde_json::from_slice::<$message>($bytes) {
            let json = serde_json::to_vec(&message).expect("what was decoded can be encoded");
            let again: $message = serde_json::from_slice(&json).expect("what was encoded can be decoded");
            assert_eq!(message, again);
        }
    )*};
}

fuzz_target!(|bytes: &[u8]| {
    check!(
        bytes, ActivityInfo, AgentError, ExecRequest, FileEvent, FileInfo, FilePathRequest, FileReadRequest,
        FileReadResponse, FileWriteRequest, ForwardRequest, ForwardResponse, GuestConfig, GuestEvent, Identity,
        IdentityReport, MkdirRequest, RemoveRequest, RenameRequest, SessionInfo, SessionRef, SignalRequest, StatusOk, Suspend, Woken,
    );
});
