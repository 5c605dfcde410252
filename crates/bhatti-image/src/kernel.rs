//! The guest kernel: an uncompressed ELF `vmlinux`, which boots without decompressing anything.
//!
//! Debian ships a bzImage. Its setup header gives the location of the compressed kernel: the
//! fields `setup_sects`, `payload_offset` and `payload_length` of the x86 boot protocol
//! (Documentation/arch/x86/boot.rst), at 0x1f1, 0x248 and 0x24c.

use bhatti_host::blocking;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use liblzma::read::XzDecoder;
use ruzstd::decoding::StreamingDecoder;

use crate::apt::{self, AptError, Package};
use crate::modules::loadable::{self, Packing};
use crate::modules::{self, ModuleError};
use crate::tool::{ToolError, run_quietly};

const ELF_MAGIC: &[u8] = b"\x7fELF";
const ZSTD_MAGIC: &[u8] = b"\x28\xb5\x2f\xfd";
const XZ_MAGIC: &[u8] = b"\xfd7zXZ\0";
const BOOT_SECTOR_BYTES: usize = 512;

/// A kernel could not be built.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The package could not be downloaded.
    #[error("failed to fetch the kernel package")]
    Fetch(#[source] AptError),
    /// The package could not be unpacked.
    #[error("failed to unpack the kernel package")]
    Unpack(#[source] ToolError),
    /// A file could not be read or written.
    #[error("failed to {step} `{}`", path.display())]
    File {
        /// The step that failed.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file is not a bootable kernel.
    #[error("`{}` is neither an ELF vmlinux nor a bzImage with a zstd or xz kernel in it", path.display())]
    Unrecognized {
        /// The file.
        path: PathBuf,
    },
    /// The kernel inside the bzImage is damaged.
    #[error("failed to decompress the kernel in `{}`", path.display())]
    Decompress {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel's modules could not be used.
    #[error(transparent)]
    Modules(#[from] ModuleError),
}

/// Returns Debian's kernel package for virtual machines: the newest that this machine's apt
/// knows.
pub(crate) async fn debian_package() -> Result<Package, KernelError> {
    let architecture = apt::architecture().await.map_err(KernelError::Fetch)?;
    apt::newest_dependency(&format!("linux-image-cloud-{architecture}"))
        .await
        .map_err(KernelError::Fetch)
}

/// Name of the directory of the modules that a guest loads as it boots.
pub(crate) const MODULES: &str = "modules";
/// Name of the directory of the modules that a guest can load later. Kernels that older versions
/// of bhatti built do not have it.
pub(crate) const LOADABLE_MODULES: &str = "loadable-modules";

/// Downloads `package` and writes `vmlinux` and the directories of modules into `directory`.
/// Works in `scratch`.
pub(crate) async fn from_package(
    package: &Package,
    scratch: &Path,
    directory: &Path,
) -> Result<(), KernelError> {
    let archive = apt::download(package, scratch).await.map_err(KernelError::Fetch)?;
    let unpacked = scratch.join("kernel");
    let arguments = ["-x", &archive.to_string_lossy(), &unpacked.to_string_lossy()];
    run_quietly("dpkg-deb", &arguments, scratch).await.map_err(KernelError::Unpack)?;
    let boot = unpacked.join("boot");
    let entries =
        blocking(|| fs::read_dir(&boot)).map_err(|source| file_error("list", &boot, source))?;
    let image = entries.flatten().map(|entry| entry.path()).find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
    });
    let image = image.ok_or(KernelError::Unrecognized { path: boot })?;
    blocking(|| {
        write_vmlinux(&image, &directory.join("vmlinux"))?;
        collect_modules(&unpacked.join("lib/modules"), Packing::Kept, directory)
    })
}

fn collect_modules(tree: &Path, packing: Packing, directory: &Path) -> Result<(), KernelError> {
    let at_boot = modules::collect(tree, &directory.join(MODULES))?;
    Ok(loadable::collect(tree, &at_boot, packing, &directory.join(LOADABLE_MODULES))?)
}

/// Writes `vmlinux` and the directories of modules into `directory`, from a kernel that the
/// operator supplies.
pub(crate) fn from_file(
    image: &Path,
    module_tree: Option<&Path>,
    directory: &Path,
) -> Result<(), KernelError> {
    write_vmlinux(image, &directory.join("vmlinux"))?;
    if let Some(tree) = module_tree {
        return collect_modules(tree, Packing::Undone, directory);
    }
    let modules = directory.join(MODULES);
    fs::create_dir(&modules).map_err(|source| file_error("create", &modules, source))
}

fn write_vmlinux(image: &Path, vmlinux: &Path) -> Result<(), KernelError> {
    let bytes = fs::read(image).map_err(|source| file_error("read", image, source))?;
    let kernel = extract(&bytes)
        .map_err(|source| KernelError::Decompress { path: image.to_owned(), source })?;
    let kernel = kernel.ok_or_else(|| KernelError::Unrecognized { path: image.to_owned() })?;
    fs::write(vmlinux, kernel).map_err(|source| file_error("write", vmlinux, source))
}

/// Returns the ELF kernel in `image`; `None` if `image` has no kernel in a known format.
fn extract(image: &[u8]) -> io::Result<Option<Vec<u8>>> {
    if image.starts_with(ELF_MAGIC) {
        return Ok(Some(image.to_vec()));
    }
    let Some(payload) = bzimage_payload(image) else { return Ok(None) };
    let mut kernel = Vec::new();
    if payload.starts_with(ZSTD_MAGIC) {
        StreamingDecoder::new(payload).map_err(io::Error::other)?.read_to_end(&mut kernel)?;
    } else if payload.starts_with(XZ_MAGIC) {
        XzDecoder::new(payload).read_to_end(&mut kernel)?;
    }
    Ok(kernel.starts_with(ELF_MAGIC).then_some(kernel))
}

fn bzimage_payload(image: &[u8]) -> Option<&[u8]> {
    let field = |at: usize| {
        let bytes = image.get(at..)?.first_chunk::<4>()?;
        usize::try_from(u32::from_le_bytes(*bytes)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = usize::from(*image.get(0x1f1)?);
    let start = (setup_sectors + 1) * BOOT_SECTOR_BYTES + field(0x248)?;
    image.get(start..start.checked_add(field(0x24c)?)?)
}

fn file_error(step: &'static str, path: &Path, source: io::Error) -> KernelError {
    KernelError::File { step, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a bzImage of one setup sector, with `payload` at offset 16 after it.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * BOOT_SECTOR_BYTES + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 16;
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows is not the payload");
        image
    }

    fn xz(plain: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        liblzma::read::XzEncoder::new(plain, 1).read_to_end(&mut packed).unwrap();
        packed
    }

    #[test]
    fn elf_kernel_is_used_unchanged() {
        assert_eq!(extract(b"\x7fELF and so on").unwrap().unwrap(), b"\x7fELF and so on");
    }

    #[test]
    fn kernel_is_extracted_from_a_bzimage() {
        let zstd = ruzstd::encoding::compress_to_vec(
            &b"\x7fELF zstd"[..],
            ruzstd::encoding::CompressionLevel::Fastest,
        );

        assert_eq!(extract(&bzimage(&zstd)).unwrap().unwrap(), b"\x7fELF zstd");
        assert_eq!(extract(&bzimage(&xz(b"\x7fELF xz"))).unwrap().unwrap(), b"\x7fELF xz");
    }

    #[test]
    fn other_files_are_not_kernels() {
        for image in
            [&b""[..], b"#!/bin/sh", &vec![0; 4096], &bzimage(b"gz"), &bzimage(&xz(b"no elf"))]
        {
            assert_eq!(extract(image).unwrap(), None);
        }
    }

    #[test]
    fn damaged_kernel_is_an_error() {
        let packed = xz(b"\x7fELF xz");

        assert!(extract(&bzimage(&packed[..packed.len() / 2])).is_err());
    }
}
