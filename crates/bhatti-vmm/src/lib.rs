//! The engine for VMMs that are processes: everything but the words of one VMM.
//!
//! [`ProcessEngine`] boots, saves, restores, adopts and ends VMs. It owns a VM's directory, its
//! record (`vm.json`), its snapshots with their manifest, its process, console and log. A
//! [`Vmm`] starts its program, talks to it, and knows the form of its disks.

mod boot;
pub mod cgroup;
mod console;
mod draft;
mod engine;
mod files;
mod generation;
mod log;
mod machine;
mod manifest;
mod pages;
mod process;
mod record;
mod restore;
mod save;
mod user;
mod vm;
mod vmm;
mod vsock;

pub use console::Console;
pub use draft::on_thread;
pub use engine::ProcessEngine;
pub use files::{
    STATE_BYTES_MAX, create_private, memory_name, new_name, remove_other_memory, share,
};
pub use generation::{Generation, damaged, same};
pub use log::{create_log, log_tail};
pub use machine::{EMPTY_VOLUME_BYTES, Machine, UNCONFIGURED_MAC, Volume};
pub use manifest::{Manifest, PAGES, SavedMemory};
pub use pages::{PAGE, piece_bytes, pieces, read_pages, write_pages};
pub use process::{kind_of_program, remove, vm_name};
pub use record::{Record, RecordedVm, recorded_machine};
pub use user::{give_as, give_to, user_of};
pub use vmm::{Connections, LOG, Launch, Origin, Running, Saved, Source, Unfinished, VmState, Vmm};
pub use vsock::VsockChannel;
