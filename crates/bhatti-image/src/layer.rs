//! Applies a layer to a tree of files.
//!
//! A layer is a tar archive of the files that it adds or changes. A whiteout (`.wh.NAME`) removes
//! what layers below it have under a name, and `.wh..wh..opq` all that they have in its directory.
//! Source: the OCI image specification, `layer.md`.
//!
//! Layers are untrusted. Each name is looked up below the tree's root by the kernel
//! ([`tree::Tree`]), so neither names nor links lead out of it, and `..` is refused. Device nodes
//! and attributes that only a kernel's administrator may set are left out and counted. Absolute
//! names and the targets of links are inside the tree.

mod apply;
mod content;
mod finish;
mod header;
mod metadata;
mod name;
mod owners;
mod pax;
mod reader;
mod removal;
mod sparse;
mod tree;

use std::io::{self, Read};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub(crate) use finish::finish;
pub(crate) use owners::Owners;

/// The limits of one layer. A parent passes what is left of the image's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Limits {
    /// Number of entries.
    pub(crate) entries: u64,
    /// Sizes of all files, with their holes, in bytes.
    pub(crate) bytes: u64,
}

/// What a layer had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Applied {
    /// Number of entries.
    pub(crate) entries: u64,
    /// Sizes of its files, with their holes, in bytes.
    pub(crate) bytes: u64,
    /// Device nodes that were left out.
    pub(crate) devices: u64,
    /// Extended attributes that were left out.
    pub(crate) attributes: u64,
}

/// What a tree takes in a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TreeSize {
    /// Space for the data, in whole blocks of 4,096 bytes.
    pub(crate) bytes: u64,
    /// Files, directories and links.
    pub(crate) inodes: u64,
}

/// A layer cannot be applied. The tree has a part of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// An entry is at fault.
    #[error("`{}`: {source}", printable(name))]
    Entry {
        /// Its name in the archive.
        name: Vec<u8>,
        /// What is wrong with it.
        source: Box<Self>,
    },
    /// The archive does not follow its format, or has something that an image cannot have.
    #[error("{0}")]
    Format(&'static str),
    /// An entry's type is not known.
    #[error("entries of type {:?} are not supported", char::from(*.0))]
    UnknownKind(u8),
    /// The entries exceed a limit.
    #[error("the image has more than {limit} {what}")]
    TooLarge {
        /// What is limited.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The archive cannot be read or decompressed.
    #[error("the archive cannot be read: {0}")]
    Read(#[source] io::Error),
    /// The host refused an operation.
    #[error("{0}")]
    Host(#[source] io::Error),
}

impl From<Errno> for LayerError {
    fn from(error: Errno) -> Self {
        Self::Host(error.into())
    }
}

impl LayerError {
    /// The error itself, without the name of the entry.
    pub(crate) fn cause(&self) -> &Self {
        match self {
            Self::Entry { source, .. } => source.cause(),
            error => error,
        }
    }
}

/// Adds an entry's name to an error.
fn complaint(name: &[u8]) -> impl Fn(LayerError) -> LayerError + use<> {
    let name = name.to_vec();
    move |source| match source {
        error @ LayerError::Entry { .. } => error,
        source => LayerError::Entry { name: name.clone(), source: Box::new(source) },
    }
}

/// Returns a name for a message, of at most 200 characters.
fn printable(name: &[u8]) -> String {
    const LENGTH_MAX: usize = 200;
    let text = String::from_utf8_lossy(name);
    let escaped = text.chars().flat_map(char::escape_default);
    let mut text: String = escaped.clone().take(LENGTH_MAX).collect();
    if escaped.count() > LENGTH_MAX {
        text.push('…');
    }
    text
}

/// Applies a layer, an uncompressed tar archive, to the tree in `root`.
///
/// # Errors
///
/// Returns an error that names the entry at fault. The tree then has a part of the layer. Blocks
/// on disk.
pub(crate) fn apply(
    root: OwnedFd,
    layer: impl Read,
    limits: Limits,
    owners: Owners,
) -> Result<Applied, LayerError> {
    let mut entries = reader::Entries::new(layer);
    let mut target = apply::Target::new(root, owners);
    let mut applied = Applied::default();
    while let Some(entry) = entries.next()? {
        applied.entries += 1;
        if let reader::Kind::File { size, .. } = entry.kind {
            applied.bytes = applied.bytes.saturating_add(size);
        }
        check(applied.entries, limits.entries, "files")?;
        check(applied.bytes, limits.bytes, "bytes in its files")?;
        let left_out =
            target.apply(&entry, &mut entries.content()).map_err(complaint(&entry.name))?;
        applied.devices += u64::from(left_out.is_device);
        applied.attributes += left_out.attributes;
    }
    entries.finish()?;
    Ok(applied)
}

fn check(count: u64, limit: u64, what: &'static str) -> Result<(), LayerError> {
    if count > limit { Err(LayerError::TooLarge { what, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod umoci;
