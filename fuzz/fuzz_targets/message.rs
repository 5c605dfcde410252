//! Any bytes decode to a JSON message or an error. A decoded message survives another round trip.
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
            let json = serde_json::to_vec(&message).expect("a decoded message can be encoded");
            let again: $message = serde_json::from_slice(&json).expect("an encoded message can be decoded");
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
