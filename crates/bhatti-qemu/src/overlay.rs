//! Empty qcow2 overlays over a raw image.
//!
//! Written here rather than by `qemu-img`, whose start takes longer than all the rest of making a sandbox's files. The layout is that
//! of QEMU's docs/interop/qcow2.txt, version 3, with four clusters: header, refcount table, refcount block, first-level table.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: usize = 1 << CLUSTER_BITS;
const HEADER_BYTES: u32 = 104;
const MAGIC: &[u8; 4] = b"QFI\xfb";
const VERSION: u32 = 3;
/// Refcounts of 2^4 bits.
const REFCOUNT_ORDER: u32 = 4;
const BACKING_FORMAT_EXTENSION: u32 = 0xe279_2aca;

/// The bytes that one entry of the first-level table covers: a cluster of second-level entries, each for a cluster.
const L1_ENTRY_BYTES: u64 = (CLUSTER_BYTES as u64 / 8) * CLUSTER_BYTES as u64;
/// The bytes that the one cluster of first-level entries can cover.
const DISK_BYTES_MAX: u64 = L1_ENTRY_BYTES * (CLUSTER_BYTES as u64 / 8);
/// The longest path of a base that fits into the header's cluster, by the format's own rule.
const BASE_PATH_BYTES_MAX: usize = 1023;

/// An overlay could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The base cannot be used.
    #[error("failed to open the base image `{}`", path.display())]
    Base {
        /// The base.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The base is larger than the format's first table can cover here, or its path too long.
    #[error("the base image `{}` is too large or its path too long for an overlay", path.display())]
    Unsupported {
        /// The base.
        path: PathBuf,
    },
    /// The overlay cannot be written.
    #[error("failed to write the overlay `{}`", path.display())]
    Write {
        /// The overlay.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Creates an empty overlay at `path` over the raw image `base`, of the same size. `base` should be absolute.
///
/// # Errors
///
/// Returns an error if the base cannot be used or the overlay not written; `path` must not exist yet. Blocks on disk.
pub fn create(path: &Path, base: &Path) -> Result<(), OverlayError> {
    let metadata = fs::metadata(base)
        .map_err(|source| OverlayError::Base { path: base.to_owned(), source })?;
    if metadata.len() > DISK_BYTES_MAX || base.as_os_str().len() > BASE_PATH_BYTES_MAX {
        return Err(OverlayError::Unsupported { path: base.to_owned() });
    }
    let image = empty_image(metadata.len(), base.as_os_str().as_bytes());
    File::create_new(path)
        .and_then(|mut file| file.write_all(&image))
        .map_err(|source| OverlayError::Write { path: path.to_owned(), source })
}

fn empty_image(disk_bytes: u64, base: &[u8]) -> Vec<u8> {
    let cluster = |number: u64| number * CLUSTER_BYTES as u64;
    let (refcount_table, refcount_block, l1_table) = (cluster(1), cluster(2), cluster(3));
    // Below 2^13 entries by the check above.
    let l1_entries = u32::try_from(disk_bytes.div_ceil(L1_ENTRY_BYTES)).unwrap_or(u32::MAX);
    let base_length = u32::try_from(base.len()).unwrap_or(u32::MAX);
    let base_offset = u64::from(HEADER_BYTES) + 16 + 8;

    let mut image = Vec::with_capacity(4 * CLUSTER_BYTES);
    image.extend_from_slice(MAGIC);
    image.extend_from_slice(&VERSION.to_be_bytes());
    image.extend_from_slice(&base_offset.to_be_bytes());
    image.extend_from_slice(&base_length.to_be_bytes());
    image.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    image.extend_from_slice(&disk_bytes.to_be_bytes());
    image.extend_from_slice(&0u32.to_be_bytes()); // no encryption
    image.extend_from_slice(&l1_entries.to_be_bytes());
    image.extend_from_slice(&l1_table.to_be_bytes());
    image.extend_from_slice(&refcount_table.to_be_bytes());
    image.extend_from_slice(&1u32.to_be_bytes()); // clusters of the refcount table
    image.extend_from_slice(&[0; 12]); // no snapshots
    image.extend_from_slice(&[0; 24]); // no features
    image.extend_from_slice(&REFCOUNT_ORDER.to_be_bytes());
    image.extend_from_slice(&HEADER_BYTES.to_be_bytes());
    image.extend_from_slice(&BACKING_FORMAT_EXTENSION.to_be_bytes());
    image.extend_from_slice(&3u32.to_be_bytes());
    image.extend_from_slice(b"raw\0\0\0\0\0");
    image.extend_from_slice(&[0; 8]); // the last extension
    image.extend_from_slice(base);
    image.resize(4 * CLUSTER_BYTES, 0);
    image[CLUSTER_BYTES..CLUSTER_BYTES + 8].copy_from_slice(&refcount_block.to_be_bytes());
    for used in 0..4 {
        let at = 2 * CLUSTER_BYTES + used * 2;
        image[at..at + 2].copy_from_slice(&1u16.to_be_bytes());
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn qemu_img(arguments: &[&str]) -> String {
        let output =
            bhatti_host::process::command("qemu-img").args(arguments).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[tokio::test]
    async fn qemu_finds_the_overlay_sound_and_its_content_the_bases() {
        let directory = tempfile::tempdir().unwrap();
        for bytes in [512, 3 << 20, (5 << 30) + 512] {
            let (base, overlay) =
                (directory.path().join(format!("{bytes}.raw")), directory.path().join("o.qcow2"));
            fs::write(&base, "the base's content").unwrap();
            File::options().write(true).open(&base).unwrap().set_len(bytes).unwrap();

            create(&overlay, &base).unwrap();

            let (base_text, overlay_text) = (base.to_str().unwrap(), overlay.to_str().unwrap());
            assert!(qemu_img(&["check", overlay_text]).await.contains("No errors"));
            let compared =
                qemu_img(&["compare", "-f", "raw", "-F", "qcow2", base_text, overlay_text]).await;
            assert!(compared.contains("Images are identical"), "{compared}");
            fs::remove_file(overlay).unwrap();
        }
    }

    #[test]
    fn overlay_never_replaces_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let (base, overlay) = (directory.path().join("base"), directory.path().join("overlay"));
        fs::write(&base, [0; 512]).unwrap();
        fs::write(&overlay, "somebody's").unwrap();

        let error = create(&overlay, &base).unwrap_err();

        assert!(matches!(error, OverlayError::Write { .. }), "{error}");
        assert_eq!(fs::read(&overlay).unwrap(), b"somebody's");
    }
}
