//! Archives that become images: the tar of a root file system, the output of `docker save`, and
//! OCI layouts as a tar.
//!
//! A root file system is decompressed and otherwise left unchanged. An image of layers is
//! flattened into one tar ([`layers`]). Both have a size limit, so a small archive cannot fill
//! the disk.

mod layers;
mod manifest;
mod zstd;

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read, Take};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use flate2::read::MultiGzDecoder;
use liblzma::stream::{CONCATENATED, Stream};
use tar::{Archive, EntryType};

use self::zstd::ZstdFrames;

/// Maximum size of an image's description (manifest or index), in bytes.
const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// Maximum of memory that the xz decoder may use, in bytes: the strongest preset takes 65 MiB.
const XZ_MEMORY_BYTES_MAX: u64 = 256 << 20;

/// Maximum size of an entry's extension (its name, its attributes), in bytes: the reader holds
/// each extension in memory.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;

/// Magic bytes of gzip, zstd and xz files.
const COMPRESSED: [&[u8]; 3] = [&[0x1f, 0x8b], &[0x28, 0xb5, 0x2f, 0xfd], b"\xfd7zXZ\0"];

/// An archive cannot become an image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    /// The archive is malformed, or its format is not supported.
    #[error("{0}")]
    Bad(String),
    /// The archive's content is larger than the limit.
    #[error("the archive has more than {limit} bytes of content")]
    TooLarge {
        /// The limit, in bytes.
        limit: u64,
    },
    /// A file of this host could not be read or written.
    #[error("failed to unpack the archive")]
    File(#[from] io::Error),
}

fn bad(what: impl Into<String>) -> ArchiveError {
    ArchiveError::Bad(what.into())
}

/// A part of a file.
#[derive(Clone, Debug)]
struct Part<'file> {
    file: &'file File,
    offset: u64,
    bytes: u64,
}

impl<'file> Part<'file> {
    fn whole(file: &'file File) -> io::Result<Self> {
        Ok(Self { file, offset: 0, bytes: file.metadata()?.len() })
    }

    fn reader(&self) -> Take<PartReader<'file>> {
        PartReader { file: self.file, at: self.offset }.take(self.bytes)
    }

    /// Returns a reader of the content. Decompresses it if its first bytes are those of a
    /// compressed file.
    fn decompressed(&self) -> Result<Box<dyn Read + 'file>, ArchiveError> {
        let mut magic = [0; 6];
        let read = self.reader().read(&mut magic)?;
        let reader = BufReader::with_capacity(1 << 16, self.reader());
        let [gzip, zstd, xz] = COMPRESSED.map(|start| magic[..read].starts_with(start));
        Ok(if gzip {
            Box::new(MultiGzDecoder::new(reader))
        } else if zstd {
            Box::new(ZstdFrames::Between(reader))
        } else if xz {
            let stream = Stream::new_stream_decoder(XZ_MEMORY_BYTES_MAX, CONCATENATED);
            let stream = stream.map_err(|error| bad(error.to_string()))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream))
        } else {
            Box::new(reader)
        })
    }

    /// Reads all of the content, for descriptions of images.
    fn read_small(&self) -> Result<Vec<u8>, ArchiveError> {
        if self.bytes > MANIFEST_BYTES_MAX {
            return Err(bad(format!("a manifest of {} bytes is too long", self.bytes)));
        }
        let mut content = Vec::new();
        self.reader().read_to_end(&mut content)?;
        Ok(content)
    }
}

/// Reads a file from an offset on. Other readers of the file do not move the offset.
struct PartReader<'file> {
    file: &'file File,
    at: u64,
}

impl Read for PartReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Reads no more than `left` bytes, which several readers may share. Reading more is an error of
/// the kind [`TOO_LARGE`].
struct Bounded<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

const TOO_LARGE: io::ErrorKind = io::ErrorKind::FileTooLarge;

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left.set(self.left.get().checked_sub(read as u64).ok_or(TOO_LARGE)?);
        Ok(read)
    }
}

/// Returns the root file system that an archive describes, as one uncompressed tar of at most
/// `limit` bytes. It is the archive itself if that is such a tar, or else an unnamed file in
/// `scratch`.
///
/// # Errors
///
/// Returns an error that names the archive's fault, without a path of this host. Blocks on disk.
pub(crate) fn root_tar(archive: File, scratch: &Path, limit: u64) -> Result<File, ArchiveError> {
    let outer = if is_compressed(&archive)? {
        let mut outer = tempfile::tempfile_in(scratch)?;
        let decompressed = Part::whole(&archive)?.decompressed()?;
        let left = Rc::new(Cell::new(limit));
        copy(Bounded { inner: decompressed, left }, &mut outer, limit)?;
        outer
    } else {
        archive
    };
    if outer.metadata()?.len() > limit {
        return Err(ArchiveError::TooLarge { limit });
    }
    let Some(layers) = manifest::find_layers(&outer)? else { return Ok(outer) };
    let flat = tempfile::tempfile_in(scratch)?;
    layers::flatten(&layers, &flat, limit)?;
    Ok(flat)
}

fn is_compressed(file: &File) -> io::Result<bool> {
    let mut magic = [0; 6];
    let read = file.read_at(&mut magic, 0)?;
    Ok(COMPRESSED.iter().any(|start| magic[..read].starts_with(start)))
}

/// Refuses extensions that are too long, before a reader of entries holds them in memory.
fn check_extensions(tar: impl Read) -> io::Result<()> {
    for entry in Archive::new(tar).entries()?.raw(true) {
        // The reader of the entries reports an archive that cannot be read.
        let Ok(entry) = entry else { return Ok(()) };
        let is_extension = matches!(
            entry.header().entry_type(),
            EntryType::XHeader
                | EntryType::XGlobalHeader
                | EntryType::GNULongName
                | EntryType::GNULongLink
        );
        if is_extension && entry.size() > EXTENSION_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an entry's name or attributes are too long",
            ));
        }
    }
    Ok(())
}

fn copy(mut from: impl Read, to: &mut File, limit: u64) -> Result<(), ArchiveError> {
    io::copy(&mut from, to).map(drop).map_err(|error| explain(error, limit))
}

/// Converts an error of reading an archive: blames the archive, unless the error is one of this
/// host's disk.
fn explain(error: io::Error, limit: u64) -> ArchiveError {
    match error.kind() {
        TOO_LARGE => ArchiveError::TooLarge { limit },
        io::ErrorKind::StorageFull
        | io::ErrorKind::QuotaExceeded
        | io::ErrorKind::PermissionDenied => error.into(),
        _ => bad(format!("it cannot be read: {error}")),
    }
}
