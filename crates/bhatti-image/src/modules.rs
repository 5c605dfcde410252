//! The kernel modules of a guest: modules that it needs before its root disk is mounted, and
//! modules that it can load later ([`loadable`]).

pub(crate) mod loadable;

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use liblzma::read::XzDecoder;
use ruzstd::decoding::StreamingDecoder;

/// Modules that lohar loads at boot, after their dependencies. If a module is built into the
/// kernel, there is no file of it.
const WANTED: [&str; 5] =
    ["virtio_mmio", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport", "tcp_diag"];

/// Kernel modules could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
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
}

/// Returns the modules' part of a kernel's source. A version of bhatti that wants other modules
/// rebuilds the kernel.
pub(crate) fn wanted() -> String {
    format!(" with modules {} and loadable ones {}", WANTED.join(","), loadable::wanted())
}

/// Copies the wanted modules of `tree`, uncompressed, to `target/NN-name.ko`, numbered in the order
/// of loading. Returns their names.
pub(crate) fn collect(tree: &Path, target: &Path) -> Result<Vec<String>, ModuleError> {
    fs::create_dir(target).map_err(|source| file_error("create", target, source))?;
    let mut files = Vec::new();
    find_modules(tree, &mut files)?;
    let mut collected: Vec<(String, Vec<u8>)> = Vec::new();
    for name in WANTED {
        add(name, &files, &mut collected)?;
    }
    for (position, (name, bytes)) in collected.iter().enumerate() {
        let path = target.join(format!("{position:02}-{name}.ko"));
        fs::write(&path, bytes).map_err(|source| file_error("write", &path, source))?;
    }
    Ok(collected.into_iter().map(|(name, _)| name).collect())
}

fn add(
    name: &str,
    files: &[PathBuf],
    collected: &mut Vec<(String, Vec<u8>)>,
) -> Result<(), ModuleError> {
    if collected.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let Some(file) = files.iter().find(|file| module_name(file).is_some_and(|found| found == name))
    else {
        return Ok(());
    };
    let bytes = read_module(file).map_err(|source| file_error("read", file, source))?;
    for dependency in dependencies(&bytes) {
        add(&dependency, files, collected)?;
    }
    collected.push((name.to_owned(), bytes));
    Ok(())
}

fn find_modules(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), ModuleError> {
    let failed = |source| file_error("list", directory, source);
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // Links are skipped: a link could lead out of the tree, or in circles.
        match entry.file_type().map_err(failed)? {
            kind if kind.is_dir() => find_modules(&entry.path(), files)?,
            kind if kind.is_file() && module_name(&entry.path()).is_some() => {
                files.push(entry.path());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Returns the module's name. The kernel treats dashes and underscores in it alike.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.zst"].iter().find_map(|ending| name.strip_suffix(ending))?;
    Some(stem.replace('-', "_"))
}

fn read_module(file: &Path) -> io::Result<Vec<u8>> {
    let packed = fs::read(file)?;
    let mut module = Vec::new();
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => XzDecoder::new(&packed[..]).read_to_end(&mut module)?,
        Some("zst") => StreamingDecoder::new(&packed[..])
            .map_err(io::Error::other)?
            .read_to_end(&mut module)?,
        _ => return Ok(packed),
    };
    Ok(module)
}

/// The names after `depends=` in the module's own information section.
fn dependencies(module: &[u8]) -> Vec<String> {
    let names = information(module, "depends=").next().unwrap_or_default();
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// Returns the values of `field`, which ends with `=`, in a module's information section. The
/// section has texts of the form `field=value`, each ended by a NUL.
fn information(module: &[u8], field: &'static str) -> impl Iterator<Item = String> {
    module
        .split(|byte| *byte == 0)
        .filter_map(move |text| text.strip_prefix(field.as_bytes()))
        .map(|value| String::from_utf8_lossy(value).into_owned())
}

fn file_error(step: &'static str, path: &Path, source: io::Error) -> ModuleError {
    ModuleError::File { step, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_numbered_after_their_dependencies() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree/6.1/kernel/drivers");
        fs::create_dir_all(&tree).unwrap();
        let mut packed = Vec::new();
        let module = b"\x7fELF\0license=GPL\0depends=virtio-ring\0";
        liblzma::read::XzEncoder::new(&module[..], 1).read_to_end(&mut packed).unwrap();
        fs::write(tree.join("virtio-blk.ko.xz"), packed).unwrap();
        fs::write(tree.join("virtio_ring.ko"), b"\x7fELF\0depends=\0").unwrap();
        fs::write(tree.join("unwanted.ko"), b"\x7fELF\0depends=\0").unwrap();

        let target = root.path().join("modules");
        collect(&root.path().join("tree"), &target).unwrap();

        let mut names: Vec<_> =
            fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["00-virtio_ring.ko", "01-virtio_blk.ko"]);
        assert_eq!(fs::read(target.join("01-virtio_blk.ko")).unwrap(), module);
    }
}
