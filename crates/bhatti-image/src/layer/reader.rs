//! Reads the entries of a tar archive, one after another.
//!
//! The reader holds one entry's name and attributes in memory, and they have a size limit. It
//! understands ustar, GNU's and PAX's headers, and all four forms of sparse files.

use std::io::{self, Read};

use super::header::{BLOCK, Header, more_segments};
use super::pax::Pax;
use super::sparse::SparseMap;
use super::{LayerError, complaint};

/// Maximum size of an extension (a long name, the records of a PAX header), in bytes.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;

/// Type flags of headers.
mod flag {
    pub(super) const REGULAR: [u8; 3] = [b'0', 0, b'7'];
    pub(super) const HARD_LINK: u8 = b'1';
    pub(super) const SYMLINK: u8 = b'2';
    pub(super) const CHARACTER_DEVICE: u8 = b'3';
    pub(super) const BLOCK_DEVICE: u8 = b'4';
    pub(super) const DIRECTORY: u8 = b'5';
    pub(super) const FIFO: u8 = b'6';
    pub(super) const LONG_LINK: u8 = b'K';
    pub(super) const LONG_NAME: u8 = b'L';
    pub(super) const SPARSE: u8 = b'S';
    pub(super) const PAX: u8 = b'x';
    pub(super) const GLOBAL_PAX: u8 = b'g';
}

/// What an entry makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File {
        /// Where the content lies in a sparse file.
        map: Option<SparseMap>,
        /// Size with holes, in bytes.
        size: u64,
    },
    Directory,
    HardLink {
        target: Vec<u8>,
    },
    Symlink {
        target: Vec<u8>,
    },
    Fifo,
    Device,
}

/// One entry of a layer. The content of a file follows in [`Entries::content`].
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: Vec<u8>,
    pub(super) kind: Kind,
    /// Permissions with setuid, setgid and sticky bit.
    pub(super) mode: u32,
    pub(super) user: u32,
    pub(super) group: u32,
    /// Seconds since 1970.
    pub(super) time: i64,
    pub(super) attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The entries of an archive.
pub(super) struct Entries<R> {
    archive: R,
    /// Content of the current entry that has not been read, in bytes.
    left: u64,
    /// Bytes after the content, up to the next header.
    padding: u64,
}

impl<R: Read> Entries<R> {
    pub(super) fn new(archive: R) -> Self {
        Self { archive, left: 0, padding: 0 }
    }

    /// Reads the next entry. Skips what is left of the one before it.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        let (mut pax, mut long_name, mut long_link) = (Pax::default(), None, None);
        loop {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            self.begin_content(header.size()?);
            match header.kind() {
                flag::PAX => pax = Pax::parse(&self.extension()?)?,
                flag::LONG_NAME => long_name = Some(without_end(self.extension()?)),
                flag::LONG_LINK => long_link = Some(without_end(self.extension()?)),
                flag::GLOBAL_PAX => {}
                _ => {
                    let name = pax.sparse.name.take().or(pax.name.take()).or(long_name);
                    let name = name.unwrap_or_else(|| header.name());
                    let link = pax.link.take().or(long_link).unwrap_or_else(|| header.link());
                    let named = complaint(&name);
                    return self.entry(name, link, &header, pax).map_err(named).map(Some);
                }
            }
        }
    }

    /// Content of the current entry.
    pub(super) fn content(&mut self) -> Content<'_, R> {
        Content(self)
    }

    /// Reads the archive to its end. What follows the last entry does not count.
    pub(super) fn finish(mut self) -> Result<(), LayerError> {
        io::copy(&mut self.archive, &mut io::sink()).map_err(LayerError::Read)?;
        Ok(())
    }

    fn entry(
        &mut self,
        name: Vec<u8>,
        link: Vec<u8>,
        header: &Header,
        pax: Pax,
    ) -> Result<Entry, LayerError> {
        if let Some(size) = pax.size {
            self.begin_content(size);
        }
        let kind = match header.kind() {
            // Before POSIX, a directory was a file whose name ended in a slash.
            kind if flag::REGULAR.contains(&kind) && name.ends_with(b"/") => Kind::Directory,
            kind if flag::REGULAR.contains(&kind) => self.file(&pax)?,
            flag::SPARSE => self.old_sparse_file(header)?,
            flag::HARD_LINK => Kind::HardLink { target: link },
            flag::SYMLINK => Kind::Symlink { target: link },
            flag::DIRECTORY => Kind::Directory,
            flag::FIFO => Kind::Fifo,
            flag::CHARACTER_DEVICE | flag::BLOCK_DEVICE => Kind::Device,
            other => return Err(LayerError::UnknownKind(other)),
        };
        let id = |named: Option<i64>, own: i64| {
            u32::try_from(named.unwrap_or(own))
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or(LayerError::Format("an owner's id is out of range"))
        };
        Ok(Entry {
            name,
            kind,
            mode: u32::try_from(header.mode()? & 0o7777).unwrap_or_default(),
            user: id(pax.user, header.user()?)?,
            group: id(pax.group, header.group()?)?,
            time: pax.time.map_or_else(|| header.time(), Ok)?,
            attributes: pax.attributes,
        })
    }

    fn file(&mut self, pax: &Pax) -> Result<Kind, LayerError> {
        let sparse = &pax.sparse;
        let Some(size) = sparse.real_size else {
            return Ok(Kind::File { map: None, size: self.left });
        };
        let segments = if sparse.has_map_in_content {
            super::sparse::read_map(self)?
        } else {
            sparse.segments.clone()
        };
        let map = SparseMap::new(segments, size, self.left)?;
        Ok(Kind::File { map: Some(map), size })
    }

    /// Reads the blocks that continue the header of a sparse file in GNU's old format.
    fn old_sparse_file(&mut self, header: &Header) -> Result<Kind, LayerError> {
        let (mut segments, mut has_more) = header.segments()?;
        while has_more {
            let mut block = [0; BLOCK];
            self.archive.read_exact(&mut block).map_err(LayerError::Read)?;
            let (more, has_still_more) = more_segments(&block)?;
            segments.extend(more);
            has_more = has_still_more;
            super::sparse::check_count(segments.len())?;
        }
        let size = header.real_size()?;
        let map = SparseMap::new(segments, size, self.left)?;
        Ok(Kind::File { map: Some(map), size })
    }

    /// Reads the next header. Returns `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, LayerError> {
        let mut block = [0; BLOCK];
        let mut read = 0;
        while read < BLOCK {
            match self.archive.read(&mut block[read..]) {
                Ok(0) if read == 0 => return Ok(None),
                Ok(0) => return Err(LayerError::Read(io::ErrorKind::UnexpectedEof.into())),
                Ok(bytes) => read += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
        let header = Header(block);
        if header.is_zero() {
            return Ok(None);
        }
        if !header.is_intact() {
            return Err(LayerError::Format("a header's checksum is wrong: this is no tar archive"));
        }
        Ok(Some(header))
    }

    fn begin_content(&mut self, size: u64) {
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    /// Reads all of the current entry's content.
    fn extension(&mut self) -> Result<Vec<u8>, LayerError> {
        if self.left > EXTENSION_BYTES_MAX {
            return Err(LayerError::Format("an entry's name or attributes are too long"));
        }
        let mut bytes = Vec::new();
        self.content().read_to_end(&mut bytes).map_err(LayerError::Read)?;
        Ok(bytes)
    }

    fn skip(&mut self) -> Result<(), LayerError> {
        let mut rest = self.archive.by_ref().take(self.left.saturating_add(self.padding));
        io::copy(&mut rest, &mut io::sink()).map_err(LayerError::Read)?;
        if rest.limit() > 0 {
            return Err(LayerError::Read(io::ErrorKind::UnexpectedEof.into()));
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }
}

/// The content of one entry. An archive that ends within it is an error.
pub(super) struct Content<'entries, R>(&'entries mut Entries<R>);

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.0.left).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let read = self.0.archive.read(&mut buffer[..wanted])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.0.left -= read as u64;
        Ok(read)
    }
}

/// Removes the zero byte that ends a long name.
fn without_end(mut name: Vec<u8>) -> Vec<u8> {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    name.truncate(end);
    name
}
