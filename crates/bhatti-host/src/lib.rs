//! The host's operating system, as bhatti uses it.
//!
//! Wraps what has sharp edges and knows nothing of sandboxes. The only crate of the host in which `unsafe` is allowed.

pub mod clock;
pub mod disk;
pub mod durable;
pub mod kvm;
pub mod memory;
pub mod namespace;
pub mod process;
pub mod processor;

pub mod socket;
pub mod tap;
