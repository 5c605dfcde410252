//! Grows the root file system to the size of its disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::ioctl::{Setter, ioctl, opcode};
use rustix::mount::{MountFlags, mount_remount};

/// The offset of the superblock on the disk, and the bytes that are read of it. These numbers and
/// the offsets below are from the kernel's Documentation/filesystems/ext4/super.rst.
const SUPERBLOCK_OFFSET: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: [u8; 2] = [0x53, 0xef];
const MAGIC_OFFSET: usize = 0x38;
const BLOCKS_LOW_OFFSET: usize = 0x4;
const BLOCKS_HIGH_OFFSET: usize = 0x150;
const LOG_BLOCK_SIZE_OFFSET: usize = 0x18;
const INCOMPATIBLE_OFFSET: usize = 0x60;
/// The feature flag of 64-bit block numbers.
const IS_64_BIT: u32 = 0x80;

/// `EXT4_IOC_RESIZE_FS` of linux/ext4.h: resizes a mounted file system to a number of blocks.
const RESIZE: rustix::ioctl::Opcode = opcode::write::<u64>(b'f', 16);

/// Grows the root file system to the size of `disk`, which is mounted. A file system that is
/// large enough already, or is not ext4, stays unchanged.
pub(super) fn grow(disk: &Path) -> io::Result<()> {
    let device = File::open(disk)?;
    let Some((blocks, block_bytes)) = size_on(&device)? else { return Ok(()) };
    let wanted = device_bytes(&device)? / block_bytes;
    if wanted <= blocks {
        return Ok(());
    }
    let root = File::open("/")?;
    // SAFETY: the request reads one number of 64 bits.
    #[expect(unsafe_code, reason = "no crate has this call")]
    unsafe {
        ioctl(&root, Setter::<RESIZE, u64>::new(wanted))?;
    }
    // Without this option, the kernel would slowly fill the new inode tables with zeros, which
    // are there already, and so fill the host's disk.
    Ok(mount_remount("/", MountFlags::NOATIME, c"noinit_itable")?)
}

/// Whether there is a whole ext4 file system on `disk`. If the host has replaced the disk since it
/// was probed, the kernel has the size of the earlier one, which is too small for it.
pub(super) fn has_file_system(disk: &Path) -> bool {
    let is_whole = || -> io::Result<bool> {
        let device = File::open(disk)?;
        let Some((blocks, block_bytes)) = size_on(&device)? else { return Ok(false) };
        Ok(blocks.saturating_mul(block_bytes) <= device_bytes(&device)?)
    };
    is_whole().unwrap_or(false)
}

fn size_on(device: &File) -> io::Result<Option<(u64, u64)>> {
    let mut superblock = [0; SUPERBLOCK_BYTES];
    device.read_exact_at(&mut superblock, SUPERBLOCK_OFFSET)?;
    Ok(size(&superblock))
}

/// Returns the number of blocks of an ext4 file system, and the size of each in bytes.
fn size(superblock: &[u8; SUPERBLOCK_BYTES]) -> Option<(u64, u64)> {
    let number =
        |offset: usize| superblock[offset..].first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    if !superblock[MAGIC_OFFSET..].starts_with(&MAGIC) {
        return None;
    }
    let is_64_bit = number(INCOMPATIBLE_OFFSET)? & IS_64_BIT != 0;
    let high = if is_64_bit { number(BLOCKS_HIGH_OFFSET)? } else { 0 };
    let blocks = u64::from(high) << 32 | u64::from(number(BLOCKS_LOW_OFFSET)?);
    let block_bytes = 1024_u64.checked_shl(number(LOG_BLOCK_SIZE_OFFSET)?)?;
    (block_bytes > 0).then_some((blocks, block_bytes))
}

fn device_bytes(device: &File) -> io::Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: the request writes one number of 64 bits.
    #[expect(unsafe_code, reason = "no crate has this call")]
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
    if result == 0 { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

/// `BLKGETSIZE64` of linux/fs.h: the size of a block device in bytes.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_of_a_file_system_is_read_from_its_superblock() {
        let mut superblock = [0; SUPERBLOCK_BYTES];
        assert_eq!(size(&superblock), None);
        superblock[0x38..0x3a].copy_from_slice(&MAGIC);
        superblock[0x4..0x8].copy_from_slice(&1_048_576_u32.to_le_bytes());
        superblock[0x18] = 2;
        superblock[0x150] = 1;
        assert_eq!(size(&superblock), Some((1_048_576, 4096)));
        superblock[0x60] = 0x80;
        assert_eq!(size(&superblock), Some(((1 << 32) + 1_048_576, 4096)));
        superblock[0x18] = 200;
        assert_eq!(size(&superblock), None);
    }
}
