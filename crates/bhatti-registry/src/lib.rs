//! A client of OCI registries: finds the image of a reference for this host, downloads its blobs,
//! and pushes images.
//!
//! A registry is as untrusted as the image. Every description has a size limit and is read by
//! [`serde_json`], every blob is streamed to disk and checked against its digest, and every
//! connection is checked against the operator's rules ([`Config`]). Requests that may succeed
//! later are repeated.
//!
//! The crate does not use `oci-client`, which holds manifests, tokens and errors of any size in
//! memory, and has no hook for the check of addresses.

mod auth;
mod blobs;
mod client;
mod config;
mod connect;
mod docker;
mod error;
mod guard;
mod http;
mod image;
mod push;
mod reference;
mod retry;

pub use auth::Credentials;
pub use blobs::{Access as BlobAccess, Blobs, Progress};
pub use client::Registries;
pub use config::{Config, Registry, read_authorities};
pub use connect::ConnectError;
pub use docker::docker_credentials;
pub use error::RegistryError;
pub use http::HttpError;
pub use image::{Blob, RemoteImage};
pub use push::Pushed;
pub use reference::{ParseReferenceError, Reference};
