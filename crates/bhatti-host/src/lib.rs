//! The host's operating system, as bhatti uses it.
//!
//! Wraps the system's error-prone interfaces and knows nothing of sandboxes. On the host side,
//! this is the only crate in which `unsafe` is allowed.

mod blocking;
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

pub use blocking::blocking;
