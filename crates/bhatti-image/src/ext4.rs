//! Ext4 files: layers are unpacked into a tree, and `mke2fs` writes the tree into a file. Nothing
//! is mounted.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::process::{Confinement, Reach};
use bhatti_host::{blocking, disk};
use tracing::info;

use crate::archive::LayerFile;
use crate::layer::{Limits, TreeSize};
use crate::tool::{self, ToolError};
use crate::unpack::{OWNERS, TREE, UnpackError, Unpacker};

/// The smallest size of a file system, in MiB; its file is sparse.
pub(crate) const DISK_MIB: u64 = 4096;
/// Maximum size of an image's files, in bytes.
const IMAGE_BYTES_MAX: u64 = 256 << 30;
/// Maximum number of an image's entries.
const ENTRIES_MAX: u64 = 1_000_000;

/// Size of an inode, in bytes.
const INODE_BYTES: u64 = 256;
/// Bytes for which `mke2fs` makes an inode, unless it is told another number.
const BYTES_PER_INODE: u64 = 16 << 10;
/// The number of inodes of the smallest file system.
const INODES_MIN: u64 = (DISK_MIB << 20) / BYTES_PER_INODE;
/// Space beside files and inodes, in bytes: the journal, and what a sandbox writes.
const FREE_BYTES: u64 = 2 << 30;

/// The first version of `mke2fs` that does not write zeros to a new file if told so.
const PREZEROED: (u32, u32) = (1, 47);

/// Layers could not be made into an ext4 file.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// A layer could not be unpacked.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// A program could not be run.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The host could not be asked, or a file not be made.
    #[error(transparent)]
    File(#[from] io::Error),
}

/// What the layers had that an image cannot have.
#[derive(Clone, Copy, Debug, Default)]
struct LeftOut {
    /// Device nodes.
    devices: u64,
    /// Extended attributes.
    attributes: u64,
}

/// Makes an ext4 file from layers, in a directory of its own.
pub(crate) struct Ext4Builder {
    scratch: PathBuf,
    unpacker: Unpacker,
    /// What the next layers may have.
    limits: Limits,
    left_out: LeftOut,
}

impl Ext4Builder {
    /// Prepares to work in `scratch`, with `program`, which is `bhatti`. The image's files have at
    /// most `bytes_max` bytes.
    ///
    /// # Errors
    ///
    /// Returns an error if the free space of the disk cannot be read. Blocks on disk.
    pub(crate) fn new(program: &Path, scratch: &Path, bytes_max: Option<u64>) -> io::Result<Self> {
        // The tree and the image are on one disk.
        let free = disk::free_bytes(scratch)? / 2;
        Ok(Self {
            scratch: scratch.to_owned(),
            unpacker: Unpacker::new(program, scratch),
            limits: Limits {
                entries: ENTRIES_MAX,
                bytes: free.min(IMAGE_BYTES_MAX).min(bytes_max.unwrap_or(u64::MAX)),
            },
            left_out: LeftOut::default(),
        })
    }

    /// Applies the next layer. Returns the SHA-256 of its uncompressed form, in hexadecimal.
    ///
    /// # Errors
    ///
    /// Returns an error that names the entry at fault.
    pub(crate) async fn apply(&mut self, layer: &LayerFile) -> Result<String, Ext4Error> {
        let (applied, diff_id) = self.unpacker.apply(layer, self.limits).await?;
        self.limits.entries -= applied.entries;
        self.limits.bytes -= applied.bytes;
        self.left_out.devices += applied.devices;
        self.left_out.attributes += applied.attributes;
        Ok(diff_id)
    }

    /// Writes the tree into the new file `image`, with a directory for users' work if
    /// `add_workspace`. Logs what was left out.
    ///
    /// # Errors
    ///
    /// Returns an error if the image is empty, or if `mke2fs` fails.
    pub(crate) async fn write(self, image: &Path, add_workspace: bool) -> Result<(), Ext4Error> {
        let size = self.unpacker.finish(add_workspace).await?;
        write_tree(&self.scratch, size, image).await?;
        let LeftOut { devices, attributes } = self.left_out;
        if devices + attributes > 0 {
            info!(devices, attributes, "Left out devices and privileged attributes of an image");
        }
        Ok(())
    }
}

/// Writes the tree in `scratch` into a new file. All tables are initialized now: a guest that
/// finished this work lazily would dirty its own pages.
async fn write_tree(scratch: &Path, size: TreeSize, image: &Path) -> Result<(), Ext4Error> {
    let tree = scratch.join(TREE);
    blocking(|| File::create_new(image))?;
    let is_prezeroed = version().await.is_some_and(|version| version >= PREZEROED);
    let options = if is_prezeroed {
        "assume_storage_prezeroed=1,root_owner=0:0"
    } else {
        "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    };
    let (mib, inodes) = geometry(size);
    let (mib, inodes) = (format!("{mib}M"), inodes.to_string());
    let mut arguments = vec!["-q", "-t", "ext4", "-b", "4096", "-m", "0", "-J", "size=16"];
    arguments.extend(["-N", &inodes, "-E", options]);
    let paths = [tree.as_os_str(), image.as_os_str(), mib.as_ref()];
    if rustix::process::geteuid().is_root() {
        let mut command = tool::prepare("mke2fs", scratch);
        command.args(arguments).arg("-d").args(paths);
        let configuration = PathBuf::from("/etc/mke2fs.conf");
        let reach = Reach { run: &[], read: &[&tree, &configuration], write: &[image] };
        bhatti_host::process::confine(&mut command, blocking(|| Confinement::new(reach))?);
        tool::run_prepared("mke2fs", command, &mut |_| {}).await?;
    } else {
        // If fakeroot is killed, its daemon `faked` stays. It has no files open and does nothing.
        let mut command = tool::prepare("fakeroot", scratch);
        command.arg("-i").arg(scratch.join(OWNERS)).args(["--", "mke2fs"]);
        command.args(arguments).arg("-d").args(paths);
        tool::run_prepared("fakeroot", command, &mut |_| {}).await?;
    }
    Ok(())
}

/// Returns the size of a file system for a tree, in MiB, and its number of inodes.
fn geometry(tree: TreeSize) -> (u64, u64) {
    // A twentieth more for the tables that say where files lie.
    let bytes = tree.bytes + tree.bytes / 20 + FREE_BYTES;
    // A sandbox's own files need inodes, too.
    let inodes = (2 * tree.inodes).max(bytes / BYTES_PER_INODE).max(INODES_MIN);
    let mib = (bytes + inodes * INODE_BYTES).div_ceil(1 << 20).max(DISK_MIB);
    (mib, inodes)
}

/// Returns the version of `mke2fs`, of which two numbers matter.
async fn version() -> Option<(u32, u32)> {
    let mut lines = Vec::new();
    let mut command = tool::prepare("mke2fs", Path::new("/"));
    command.arg("-V");
    tool::run_prepared("mke2fs", command, &mut |line| lines.push(line.to_owned())).await.ok()?;
    let version = lines.first()?.split_whitespace().nth(1)?;
    let mut numbers = version.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_system_has_room_for_its_tree() {
        assert_eq!(geometry(TreeSize { bytes: 1 << 20, inodes: 100 }), (DISK_MIB, 262_144));
        let (mib, inodes) = geometry(TreeSize { bytes: 10 << 30, inodes: 900_000 });
        assert!(mib > 12_288 + 440 && mib < 14_336, "{mib}");
        assert_eq!(inodes, 1_800_000);
    }

    #[tokio::test]
    async fn version_of_mke2fs_is_found() {
        assert!(version().await.unwrap() >= (1, 40));
    }
}
