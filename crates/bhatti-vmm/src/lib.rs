//! Shared parts of engines: a VM's files, the record of its process, its console, and unfinished
//! snapshots.
//!
//! This crate knows no VMM. The requests to a VMM, and their order, are in its engine's crate.

pub mod cgroup;
mod console;
mod draft;
mod files;
mod generation;
mod log;
mod pages;
mod process;
mod record;
mod user;
mod vsock;

pub use console::Console;
pub use draft::{Draft, copy_files};
pub use files::{
    STATE_BYTES_MAX, create_private, is_memory, memory_name, new_name, read_at_most,
    remove_other_memory, share,
};
pub use generation::{Generation, check_volumes, damaged, read_manifest, same, volume_generations};
pub use log::{create_log, log_tail};
pub use pages::{piece_bytes, pieces, read_pages, write_pages};
pub use process::{end, end_by_id, find, kill, remove, vm_name};
pub use record::{Record, Volume, volumes};
pub use user::{give_as, give_to, user_of};
pub use vsock::VsockChannel;
