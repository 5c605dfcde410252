//! The wire types of the HTTP API.
//!
//! Requests refuse unknown fields: every field has an effect. Responses may gain fields; clients ignore what they do not know.

mod error;
mod exec;
mod health;
mod sandbox;
mod snapshot;
mod user;

pub use error::{ErrorBody, ErrorCode};
pub use exec::{
    ExecEvent, ExecRequest, ExecResult, Output, STDIN_WINDOW_BYTES, StreamRequest,
    StreamServerMessage, channel,
};
pub use health::Health;
pub use sandbox::{
    CreateSandbox, Deleted, ForkSandbox, Forks, Sandbox, StartSandbox, UpdateSandbox,
};
pub use snapshot::{CreateSnapshot, ResumeSnapshot, Snapshot};
pub use user::{CreateUser, CreatedUser, User};
