//! Tests of the agent in test mode, as a subprocess, through the client or byte by byte.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod agent;
mod archives;
mod entries;
mod exec;
mod files;
mod forward;
mod limits;
mod named;
mod sessions;
mod settings;
mod vsock;
mod wire;
