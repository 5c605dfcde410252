//! Finds the program of a command in the child's own `PATH`.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// A command names no program that can be started. `launch` words these errors as the original
/// agent did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LookupError {
    /// No directory of `PATH` holds the program.
    NotInPath,
    /// The file exists, but may not be executed.
    NotExecutable(PathBuf),
    /// The program was given as a path that does not exist.
    Missing(PathBuf),
}

/// Finds `program` as a shell would: a name in `path`, anything with a slash as a path relative
/// to `cwd`.
pub(crate) fn find_program(program: &str, path: &str, cwd: &Path) -> Result<PathBuf, LookupError> {
    if program.contains('/') {
        let file = cwd.join(program);
        return match is_executable_file(&file) {
            Ok(true) => Ok(file),
            Ok(false) => Err(LookupError::NotExecutable(file)),
            Err(_) => Err(LookupError::Missing(file)),
        };
    }
    let mut refused = None;
    for directory in path.split(':') {
        let file = cwd.join(directory).join(program);
        match is_executable_file(&file) {
            Ok(true) => return Ok(file),
            Ok(false) => refused = refused.or(Some(file)),
            Err(_) => {}
        }
    }
    Err(refused.map_or(LookupError::NotInPath, LookupError::NotExecutable))
}

fn is_executable_file(file: &Path) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok(metadata.is_file() && access(file, Access::EXEC_OK).is_ok())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A directory with `bin/tool` (executable) and `etc/tool` (not).
    fn tree() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        for (directory, mode) in [("bin", 0o755), ("etc", 0o644)] {
            let file = tree.path().join(directory).join("tool");
            fs::create_dir(file.parent().unwrap()).unwrap();
            fs::write(&file, "").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        }
        tree
    }

    #[test]
    fn name_is_found_in_the_first_directory_where_it_can_be_executed() {
        let tree = tree();

        assert_eq!(
            find_program("tool", "none:etc:bin", tree.path()),
            Ok(tree.path().join("bin/tool"))
        );
    }

    #[test]
    fn slash_means_relative_to_the_working_directory() {
        let tree = tree();

        assert_eq!(find_program("./bin/tool", "", tree.path()), Ok(tree.path().join("./bin/tool")));
    }

    #[test]
    fn each_lookup_error_has_its_own_variant() {
        let tree = tree();
        let file = tree.path().join("etc/tool");

        assert_eq!(find_program("tool", "none", tree.path()), Err(LookupError::NotInPath));
        assert_eq!(
            find_program("tool", "etc", tree.path()),
            Err(LookupError::NotExecutable(file.clone()))
        );
        assert_eq!(
            find_program("etc/tool", "", tree.path()),
            Err(LookupError::NotExecutable(file))
        );
        assert_eq!(
            find_program("./x", "", tree.path()),
            Err(LookupError::Missing(tree.path().join("./x")))
        );
    }
}
