//! The log of a disk's writes, as QEMU's `blklogwrites` keeps it (dm-log-writes, version 1).
//!
//! Little endian. Sector 0: u64 magic, u64 version, u64 number of entries, u32 sector size. From
//! sector 1 on, for each entry, one sector with u64 sector, u64 number of sectors, u64 flags, u64
//! length; then the data. A discard has no data; a mark has a name of `length` bytes. Source:
//! `Documentation/admin-guide/device-mapper/log-writes.rst` of the kernel.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};

/// Bytes of a sector of the logged disk.
pub(super) const SECTOR: u64 = 512;
/// Bytes of a page. Most disks write a page atomically.
pub(super) const PAGE: u64 = 4096;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;

const FLUSH: u64 = 1;
/// The write was on the disk when it was acknowledged.
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// One logged request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The first sector that it writes.
    sector: u64,
    sectors: u64,
    flags: u64,
    /// Offset of the entry's data in the log, in bytes.
    data: u64,
}

impl Entry {
    pub(super) const fn is_flush(&self) -> bool {
        self.flags & FLUSH != 0
    }

    const fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Chooses the pieces of this write that reached the disk, if no flush followed it. Returns
    /// their offsets and lengths, in bytes: any of its sectors, any of its pages, or all of it or
    /// nothing.
    ///
    /// A write with FUA is kept whole. So is a write to the first page of the disk, which has the
    /// file system's superblock: ext4 and XFS rely on an atomic write of it.
    ///
    /// `piece` is the size that the file system expects a disk to write atomically, in bytes.
    pub(super) fn torn(&self, piece: u64, chance: &mut fastrand::Rng) -> Vec<(u64, u64)> {
        if self.flags & FUA != 0 || self.sector * SECTOR < PAGE {
            return vec![(0, self.bytes())];
        }
        let unit = [piece, PAGE, self.bytes().max(piece)][chance.usize(0..3)];
        let pieces = (0..self.bytes()).step_by(usize::try_from(unit).expect("a unit fits"));
        pieces
            .filter(|_| chance.bool())
            .map(|offset| (offset, unit.min(self.bytes() - offset)))
            .collect()
    }
}

/// Returns the current number of entries of a log. QEMU rewrites the number with every entry.
pub(super) fn count(log: &Path) -> Result<u64> {
    let mut head = [0; 28];
    File::open(log)?.read_exact_at(&mut head, 0)?;
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    ensure!((word(0), word(8)) == (MAGIC, VERSION), "{}: not a log of writes", log.display());
    ensure!(
        head[24..] == 512_u32.to_le_bytes(),
        "{}: its sectors do not have 512 bytes",
        log.display()
    );
    Ok(word(16))
}

/// Reads the first `limit` entries of a log, or all of them.
pub(super) fn read(log: &Path, limit: Option<u64>) -> Result<Vec<Entry>> {
    let entries = limit.unwrap_or(count(log)?);
    let file = File::open(log)?;
    let mut at = SECTOR;
    let mut read = Vec::new();
    for index in 0..entries {
        let mut head = [0; 32];
        file.read_exact_at(&mut head, at)?;
        let word =
            |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let entry = Entry { sector: word(0), sectors: word(8), flags: word(16), data: at + SECTOR };
        ensure!(
            entry.flags & (DISCARD | MARK) == 0,
            "entry {index} is a discard or a mark, which the disk should not support"
        );
        at += SECTOR + entry.bytes();
        read.push(entry);
    }
    Ok(read)
}

/// Writes `pieces` of an entry, or all of it, to the disk.
pub(super) fn apply(
    log: &File,
    disk: &File,
    entry: &Entry,
    pieces: Option<&[(u64, u64)]>,
) -> Result<()> {
    let whole = [(0, entry.bytes())];
    for &(offset, length) in pieces.unwrap_or(&whole) {
        let mut bytes = vec![0; usize::try_from(length)?];
        log.read_exact_at(&mut bytes, entry.data + offset)?;
        disk.write_all_at(&bytes, entry.sector * SECTOR + offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a log with the given writes: sector, content, flags.
    fn log_of(directory: &Path, writes: &[(u64, &[u8], u64)]) -> std::path::PathBuf {
        let mut bytes = Vec::new();
        for word in [MAGIC, VERSION, writes.len() as u64] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(512_u32.to_le_bytes());
        bytes.resize(512, 0);
        for (sector, content, flags) in writes {
            let start = bytes.len();
            for word in [*sector, content.len() as u64 / SECTOR, *flags, 0] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.resize(start + 512, 0);
            bytes.extend(*content);
        }
        let path = directory.join("log");
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn log_is_replayed_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let path =
            log_of(directory.path(), &[(8, &[1; 1024], 0), (0, &[], FLUSH), (9, &[2; 512], FUA)]);
        let entries = read(&path, None).unwrap();
        assert_eq!(entries.iter().map(Entry::is_flush).collect::<Vec<_>>(), [false, true, false]);
        let (log, disk) = (File::open(&path).unwrap(), tempfile::tempfile().unwrap());
        for entry in &entries {
            apply(&log, &disk, entry, None).unwrap();
        }
        let mut content = [0; 1024];
        disk.read_exact_at(&mut content, 8 * SECTOR).unwrap();
        assert_eq!((content[0], content[512]), (1, 2));
        assert_eq!(read(&path, Some(1)).unwrap().len(), 1);
    }

    #[test]
    fn torn_write_keeps_some_sectors_and_a_fua_write_keeps_all() {
        let entry = Entry { sector: 64, sectors: 16, flags: 0, data: 0 };
        let mut chance = fastrand::Rng::with_seed(7);
        let sizes: std::collections::BTreeSet<u64> = (0..100)
            .map(|_| entry.torn(SECTOR, &mut chance).iter().map(|piece| piece.1).sum())
            .collect();
        assert!(sizes.contains(&0) && sizes.contains(&8192) && sizes.len() > 5, "{sizes:?}");
        let kept = Entry { flags: FUA, ..entry };
        assert!((0..100).all(|_| kept.torn(SECTOR, &mut chance) == [(0, 8192)]));
        let superblock = Entry { sector: 2, sectors: 2, ..entry };
        assert!((0..100).all(|_| superblock.torn(SECTOR, &mut chance) == [(0, 1024)]));
    }

    #[test]
    fn file_that_is_not_a_log_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 512]).unwrap();
        assert!(read(file.path(), None).unwrap_err().to_string().contains("not a log of writes"));
    }
}
