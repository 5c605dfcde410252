//! The layers of a disk: empty qcow2 overlays over a raw image or another overlay.
//!
//! This module writes overlays itself, because starting `qemu-img` takes longer than creating all
//! other files of a sandbox. The layout is that of QEMU's docs/interop/qcow2.txt, version 3, with
//! four clusters: header, refcount table, refcount block, first-level table.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: usize = 1 << CLUSTER_BITS;
const HEADER_BYTES: u32 = 104;
/// Offset of the disk's size in the header.
const DISK_BYTES_OFFSET: u64 = 24;
const MAGIC: &[u8; 4] = b"QFI\xfb";
const VERSION: u32 = 3;
/// Refcounts of 2^4 bits.
const REFCOUNT_ORDER: u32 = 4;
const BACKING_FORMAT_EXTENSION: u32 = 0xe279_2aca;

/// Suffix of a qcow2 file's name.
const QCOW2: &str = ".qcow2";
/// The maximum number of layers of a disk: QEMU keeps each of them open.
pub(crate) const LAYERS_MAX: usize = 64;

/// Number of bytes that one entry of the first-level table covers: a cluster of second-level
/// entries, each for a cluster.
const L1_ENTRY_BYTES: u64 = (CLUSTER_BYTES as u64 / 8) * CLUSTER_BYTES as u64;
/// Number of bytes that the one cluster of first-level entries can cover.
const DISK_BYTES_MAX: u64 = L1_ENTRY_BYTES * (CLUSTER_BYTES as u64 / 8);
/// Maximum length of a base's name: the limit of file systems. The format's own limit is 1023.
const BASE_NAME_BYTES_MAX: usize = 255;

/// An overlay could not be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OverlayError {
    /// The base cannot be used.
    #[error("failed to open the base image `{}`", path.display())]
    Base {
        /// The base.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The base is larger than the one cluster of first-level entries can cover, or its name is
    /// too long.
    #[error("the base image `{}` is too large or its name too long for an overlay", path.display())]
    Unsupported {
        /// The base.
        path: PathBuf,
    },
    /// The overlay could not be written.
    #[error("failed to write the overlay `{}`", path.display())]
    Write {
        /// The overlay.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Creates an empty overlay of the size of its base. See [`create_sized`].
pub(crate) fn create(path: &Path, base: &str) -> Result<(), OverlayError> {
    create_sized(path, base, 0)
}

/// Creates an empty overlay at `path` over `base`, a file in the same directory: qcow2 if its
/// name says so, raw otherwise. The overlay has `bytes`, but at least the base's size, and is
/// zero beyond the base's end. It names the base without a directory, so that both can be moved
/// together. Its content is durable on return, because it must not be lost before a file that
/// names it. Its name becomes durable with the VM's record, which is in the same directory.
///
/// # Errors
///
/// Returns an error if the base cannot be used or the overlay cannot be written; `path` must not
/// exist. Blocks on disk.
pub(crate) fn create_sized(path: &Path, base: &str, bytes: u64) -> Result<(), OverlayError> {
    let base_path = path.with_file_name(base);
    let disk_bytes = disk_bytes(&base_path)
        .map_err(|source| OverlayError::Base { path: base_path.clone(), source })?
        .max(bytes);
    if disk_bytes > DISK_BYTES_MAX || base.len() > BASE_NAME_BYTES_MAX {
        return Err(OverlayError::Unsupported { path: base_path });
    }
    let image = empty_image(disk_bytes, base);
    File::create_new(path)
        .and_then(|mut file| file.write_all(&image).and_then(|()| file.sync_all()))
        .map_err(|source| OverlayError::Write { path: path.to_owned(), source })
}

/// Returns the names of the layers in `directory` from `top` down to the image.
pub(crate) fn chain(directory: &Path, top: &str) -> io::Result<Vec<String>> {
    let mut layers = vec![top.to_owned()];
    while let Some(base) = base_of(&directory.join(&layers[layers.len() - 1]))? {
        layers.push(base);
        if layers.len() > LAYERS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the disk has too many layers"));
        }
    }
    Ok(layers)
}

/// Returns the name of an overlay's backing file; `None` for a raw image.
fn base_of(path: &Path) -> io::Result<Option<String>> {
    if !is_qcow2(path) {
        return Ok(None);
    }
    let bad = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("`{}` is not an overlay", path.display()),
        )
    };
    let file = File::open(path)?;
    let mut header = [0; 20];
    file.read_exact_at(&mut header, 0)?;
    let offset = u64::from_be_bytes(*header[8..].first_chunk().ok_or_else(bad)?);
    let length = u32::from_be_bytes(*header[16..].first_chunk().ok_or_else(bad)?) as usize;
    if !header.starts_with(MAGIC) || length > BASE_NAME_BYTES_MAX {
        return Err(bad());
    }
    let mut name = vec![0; length];
    file.read_exact_at(&mut name, offset)?;
    let name = String::from_utf8(name).map_err(|_| bad())?;
    // Only a name is accepted, not a path: data from a VMM must not lead to another directory.
    let is_name = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    is_name.then_some(Some(name)).ok_or_else(bad)
}

/// Whether a file is an overlay, according to its name.
pub(crate) fn is_qcow2(path: &Path) -> bool {
    path.as_os_str().as_bytes().ends_with(QCOW2.as_bytes())
}

/// Returns the size of the disk in a file, in bytes.
pub(crate) fn disk_bytes(path: &Path) -> io::Result<u64> {
    if !is_qcow2(path) {
        return Ok(fs::metadata(path)?.len());
    }
    let mut size = [0; 8];
    File::open(path)?.read_exact_at(&mut size, DISK_BYTES_OFFSET)?;
    Ok(u64::from_be_bytes(size))
}

fn empty_image(disk_bytes: u64, base: &str) -> Vec<u8> {
    let format = if base.ends_with(QCOW2) { "qcow2" } else { "raw" };
    let cluster = |number: u64| number * CLUSTER_BYTES as u64;
    let (refcount_table, refcount_block, l1_table) = (cluster(1), cluster(2), cluster(3));
    // At most 2^13 entries, because the caller checked the size.
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
    image.extend_from_slice(&u32::try_from(format.len()).unwrap_or(u32::MAX).to_be_bytes());
    image.extend_from_slice(format.as_bytes());
    image.resize(image.len() + 8 - format.len(), 0);
    image.extend_from_slice(&[0; 8]); // the last extension
    image.extend_from_slice(base.as_bytes());
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
    async fn overlay_is_valid_and_has_the_content_of_its_base() {
        let directory = tempfile::tempdir().unwrap();
        for bytes in [512, 3 << 20, (5 << 30) + 512] {
            let (base, overlay) =
                (directory.path().join(format!("{bytes}.raw")), directory.path().join("o.qcow2"));
            fs::write(&base, "the base's content").unwrap();
            File::options().write(true).open(&base).unwrap().set_len(bytes).unwrap();

            create(&overlay, base.file_name().unwrap().to_str().unwrap()).unwrap();

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
        fs::write(&overlay, "another file").unwrap();

        let error = create(&overlay, "base").unwrap_err();

        assert!(matches!(error, OverlayError::Write { .. }), "{error}");
        assert_eq!(fs::read(&overlay).unwrap(), b"another file");
    }

    #[tokio::test]
    async fn chain_of_layers_can_be_moved_and_is_listed_from_the_top() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("image.ext4"), vec![7; 1 << 20]).unwrap();
        create(&path("disk-a.qcow2"), "image.ext4").unwrap();
        create(&path("disk-b.qcow2"), "disk-a.qcow2").unwrap();

        let moved = directory.path().with_extension("moved");
        fs::rename(directory.path(), &moved).unwrap();

        assert_eq!(
            chain(&moved, "disk-b.qcow2").unwrap(),
            ["disk-b.qcow2", "disk-a.qcow2", "image.ext4"]
        );
        let top = moved.join("disk-b.qcow2");
        let checked = qemu_img(&["check", top.to_str().unwrap()]).await;
        assert!(checked.contains("No errors"), "{checked}");
        let image = moved.join("image.ext4");
        let pair = [image.to_str().unwrap(), top.to_str().unwrap()];
        let compared = qemu_img(&["compare", "-f", "raw", "-F", "qcow2", pair[0], pair[1]]).await;
        assert!(compared.contains("Images are identical"), "{compared}");
        fs::remove_dir_all(moved).unwrap();
    }

    #[test]
    fn overlay_over_another_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let overlay = directory.path().join("disk.qcow2");
        for base in ["../image", "/etc/passwd", ""] {
            fs::write(&overlay, empty_image(512, base)).unwrap();
            assert!(chain(directory.path(), "disk.qcow2").is_err(), "{base}");
        }
    }
}
