//! Archives that become images: the tar of a root file system, the output of `docker save`, and
//! OCI layouts as a tar.
//!
//! A root file system counts as an image of one layer. All decompression has a limit, so a small
//! archive cannot fill the disk.

mod manifest;
mod zstd;

use std::fs::File;
use std::io::{self, BufReader, Read, Take};
use std::os::unix::fs::FileExt;

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
    /// A file of this host could not be read or written.
    #[error("failed to unpack the archive")]
    File(#[from] io::Error),
}

fn bad(what: impl Into<String>) -> ArchiveError {
    ArchiveError::Bad(what.into())
}

/// A part of a file.
#[derive(Clone, Debug)]
pub(crate) struct Part<'file> {
    pub(crate) file: &'file File,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl<'file> Part<'file> {
    pub(crate) fn whole(file: &'file File) -> io::Result<Self> {
        Ok(Self { file, offset: 0, bytes: file.metadata()?.len() })
    }

    fn reader(&self) -> Take<PartReader<'file>> {
        PartReader { file: self.file, at: self.offset }.take(self.bytes)
    }

    /// Returns a reader of the content. Decompresses it if its first bytes are those of a
    /// compressed file.
    pub(crate) fn decompressed(&self) -> Result<Box<dyn Read + 'file>, ArchiveError> {
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

/// Reads no more than `left` bytes. Reading more is an error of the kind [`TOO_LARGE`].
pub(crate) struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R> Bounded<R> {
    pub(crate) fn new(inner: R, limit: u64) -> Self {
        Self { inner, left: limit }
    }
}

/// The kind of the error of [`Bounded`].
pub(crate) const TOO_LARGE: io::ErrorKind = io::ErrorKind::FileTooLarge;

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or(TOO_LARGE)?;
        Ok(read)
    }
}

/// A part of a file that holds a layer.
#[derive(Debug)]
pub struct LayerFile {
    /// The file.
    pub file: File,
    /// Where the layer begins, in bytes.
    pub offset: u64,
    /// The layer's length, in bytes.
    pub bytes: u64,
}

impl LayerFile {
    /// Returns a layer that is a whole file.
    pub(crate) fn whole(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file, offset: 0, bytes })
    }
}

/// The image in an archive.
#[derive(Debug)]
pub(crate) struct ArchivedImage {
    /// The layers, lowest first.
    pub(crate) layers: Vec<LayerFile>,
    /// The configuration, as JSON; absent if the archive is that of a root file system.
    pub(crate) config: Option<Vec<u8>>,
}

/// Returns the image in an uncompressed archive.
///
/// # Errors
///
/// Returns an error that names the archive's fault, without a path of this host. Blocks on disk.
pub(crate) fn read_image(archive: &File) -> Result<ArchivedImage, ArchiveError> {
    let (parts, config) = match manifest::find(archive)? {
        Some(found) => (found.layers, Some(found.config)),
        None => (vec![Part::whole(archive)?], None),
    };
    let layer = |Part { file, offset, bytes }: Part<'_>| {
        Ok(LayerFile { file: file.try_clone()?, offset, bytes })
    };
    let layers = parts.into_iter().map(layer).collect::<Result<_, ArchiveError>>()?;
    Ok(ArchivedImage { layers, config })
}

/// Whether a file's first bytes are those of a compressed file.
pub(crate) fn is_compressed(file: &File) -> io::Result<bool> {
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

/// Converts an error of reading an archive.
fn explain(error: &io::Error) -> ArchiveError {
    bad(format!("it cannot be read: {error}"))
}
