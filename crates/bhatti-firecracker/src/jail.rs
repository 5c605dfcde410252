//! The jail of a VMM: the host's files that the VMM sees, and the user that it runs as.
//!
//! ```text
//!  <sandbox directory>/
//!    vmm/                      Firecracker's root directory, with links to the files it may use
//!    jail/firecracker/…/root   the jailer's path to that directory: a link to it
//!    jail/tap                  the name of the tap that was created for the VMM
//! ```
//!
//! A daemon that is root starts Firecracker through its jailer: as a separate user, with `vmm/`
//! as its root directory, in a control group. The VMM can change everything in `vmm/`, so the
//! daemon trusts nothing there. It uses files by their names in the sandbox's directory, which
//! the VMM cannot access, and moves a file that the VMM wrote there before it inspects the file.
//! Any other daemon starts Firecracker in the same directory as its own user, which must be
//! allowed to open `/dev/kvm`.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use bhatti_host::process::USERS;
use bhatti_host::{disk, tap};
use bhatti_types::SandboxId;
use bhatti_vmm::{
    EMPTY_VOLUME_BYTES, Launch, Volume, cgroup, create_private, share, user_of, vm_name,
};
use tokio::task::spawn_blocking;

use crate::Firecracker;
use crate::machine::volume_name;

const ROOT: &str = "vmm";
const JAIL: &str = "jail";
const TAP: &str = "jail/tap";

/// The root directory of the Firecracker of the VM in `directory`.
pub(crate) fn root(directory: &Path) -> PathBuf {
    directory.join(ROOT)
}

/// How a VMM uses a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// The VMM writes the file, and so is its only user.
    Own,
    /// The VMM only reads the file, which others read, too.
    Shared,
}

/// The jail of a VMM that is about to start.
#[derive(Clone, Debug)]
pub(crate) struct Jail {
    root: PathBuf,
    /// The VMM's user, if it is not the daemon's.
    user: Option<u32>,
}

impl Jail {
    /// The jail of the VM in `directory`.
    pub(crate) fn of(firecracker: &Firecracker, id: SandboxId, directory: &Path) -> Self {
        Self { root: root(directory), user: firecracker.jailer.as_ref().map(|_| user_of(id)) }
    }

    /// Makes an empty jail. An earlier one was [cleared](clear).
    pub(crate) fn make(firecracker: &Firecracker, launch: &Launch<'_>) -> io::Result<Self> {
        let Launch { id, directory, tap, .. } = *launch;
        let jail = Self::of(firecracker, id, directory);
        create_private(&jail.root)?;
        let Some(owner) = jail.user else { return Ok(jail) };
        let program = firecracker.program.file_name().unwrap_or_default();
        let place = directory.join(JAIL).join(program).join(vm_name(id));
        create_private(&place)?;
        symlink(Path::new("../../..").join(ROOT), place.join("root"))?;
        if let Some(tap) = tap {
            // Write the tap's name first: if the daemon dies in between, the next one knows which
            // tap to remove.
            fs::write(directory.join(TAP), tap)?;
            let failed =
                |error: io::Error| io::Error::other(format!("failed to create the tap: {error}"));
            tap::create_lasting(tap, owner).map_err(failed)?;
        }
        Ok(jail)
    }

    /// Gives the VMM access to `file` under the name `name`.
    pub(crate) fn admit(&self, file: &Path, name: &str, how: Use) -> io::Result<()> {
        let Some(user) = self.user else { return share(file, &self.root, name) };
        let place = self.root.join(name);
        // Link the file itself: a symbolic link leads nowhere in a jail.
        let file = fs::canonicalize(file)?;
        match fs::hard_link(&file, &place) {
            Err(error) if error.kind() == ErrorKind::CrossesDevices && how == Use::Shared => {
                disk::copy(&file, &place)?;
            }
            Err(error) if error.kind() == ErrorKind::CrossesDevices => {
                return Err(io::Error::other(
                    "a disk is on another file system than its sandbox, so it cannot be linked into Firecracker's jail",
                ));
            }
            linked => linked?,
        }
        match how {
            Use::Own => chown(&place, Some(user), Some(user)),
            Use::Shared => let_read(&place),
        }
    }

    /// Creates a file that belongs to the VMM.
    pub(crate) fn create(&self, name: &str, bytes: u64) -> io::Result<()> {
        let place = self.root.join(name);
        File::create_new(&place)?.set_len(bytes)?;
        self.user.map_or(Ok(()), |user| chown(&place, Some(user), Some(user)))
    }

    /// Returns the program and the arguments that start Firecracker with `arguments`.
    pub(crate) fn command(
        &self,
        firecracker: &Firecracker,
        launch: &Launch<'_>,
        arguments: &[&str],
    ) -> (PathBuf, Vec<String>) {
        let owned = |arguments: &[&str]| arguments.iter().map(|&one| one.to_owned()).collect();
        let name = vm_name(launch.id);
        let (Some(jailer), Some(user)) = (&firecracker.jailer, self.user) else {
            let mut all: Vec<String> = owned(&["--id", &name]);
            all.extend(owned(arguments));
            return (firecracker.program.clone(), all);
        };
        let user = user.to_string();
        let program = firecracker.program.to_string_lossy();
        let base = self.root.with_file_name(JAIL);
        let base = base.to_string_lossy();
        let mut all: Vec<String> = owned(&["--id", &name, "--uid", &user, "--gid", &user]);
        all.extend(owned(&["--exec-file", &program, "--chroot-base-dir", &base]));
        all.extend(cgroup::jailer_arguments(firecracker.groups, launch.machine.memory_mib));
        all.push("--".to_owned());
        all.extend(owned(arguments));
        (jailer.clone(), all)
    }

    /// Puts the volumes' files into the jail.
    pub(crate) fn place_volumes(&self, volumes: &[Option<Volume>]) -> io::Result<()> {
        for (slot, volume) in volumes.iter().enumerate() {
            let name = volume_name(slot);
            match volume {
                Some(Volume { path, read_only: true }) => self.admit(path, &name, Use::Shared)?,
                Some(Volume { path, read_only: false }) => self.admit(path, &name, Use::Own)?,
                None => self.create(&name, EMPTY_VOLUME_BYTES)?,
            }
        }
        Ok(())
    }
}

/// Makes a file readable for all users that can reach it.
fn let_read(file: &Path) -> io::Result<()> {
    const READABLE: u32 = 0o444;
    let mode = fs::metadata(file)?.mode();
    if mode & READABLE == READABLE {
        return Ok(());
    }
    fs::set_permissions(file, Permissions::from_mode(mode & 0o7777 | READABLE))
}

/// Removes a file that the VMM no longer needs from its jail.
pub(crate) fn expel(directory: &Path, name: &str) -> io::Result<()> {
    gone(fs::remove_file(root(directory).join(name)))
}

/// Moves a file that the VMM wrote to `place`.
pub(crate) fn take(directory: &Path, name: &str, place: &Path) -> io::Result<()> {
    // The file can be checked only where the VMM can no longer replace it.
    let safe = directory.join(name);
    discard(&safe)?;
    fs::rename(root(directory).join(name), &safe)?;
    let file = fs::symlink_metadata(&safe)?;
    if !file.is_file() {
        discard(&safe)?;
        return Err(io::Error::new(ErrorKind::InvalidData, format!("`{name}` is not a file")));
    }
    if file.uid() >= USERS.start {
        chown(&safe, Some(0), Some(0))?;
    }
    match fs::rename(&safe, place) {
        Err(error) if error.kind() == ErrorKind::CrossesDevices => {
            disk::copy(&safe, place)?;
            fs::remove_file(&safe)
        }
        renamed => renamed,
    }
}

/// Removes the file or directory at `place`, if any.
fn discard(place: &Path) -> io::Result<()> {
    match fs::symlink_metadata(place) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(place),
        Ok(_) => fs::remove_file(place),
        Err(error) => gone(Err(error)),
    }
}

/// Removes the jail of a VMM that has ended, and its tap.
pub(crate) async fn clear(directory: &Path) -> io::Result<()> {
    let directory = directory.to_owned();
    spawn_blocking(move || remove_files(&directory)).await.map_err(io::Error::other)?
}

fn remove_files(directory: &Path) -> io::Result<()> {
    match fs::read_to_string(directory.join(TAP)) {
        Ok(tap) => tap::remove(&tap)?,
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    gone(fs::remove_dir_all(root(directory)))?;
    gone(fs::remove_dir_all(directory.join(JAIL)))
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use bhatti_testkit::skip;
    use bhatti_vmm::Source;

    use super::*;

    fn made() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(root(directory.path())).unwrap();
        directory
    }

    #[test]
    fn link_or_directory_in_place_of_a_file_is_not_taken() {
        let directory = made();
        let others = directory.path().join("others");
        fs::write(&others, "secret").unwrap();
        let (inside, taken) =
            (root(directory.path()).join("state"), directory.path().join("taken"));
        symlink(&others, &inside).unwrap();
        assert!(take(directory.path(), "state", &taken).is_err());
        fs::create_dir(&inside).unwrap();
        assert!(take(directory.path(), "state", &taken).is_err());
        assert!(!taken.exists() && !directory.path().join("state").exists());

        fs::write(&inside, "saved").unwrap();
        take(directory.path(), "state", &taken).unwrap();

        assert_eq!(fs::read(&taken).unwrap(), b"saved");
        assert!(!inside.exists());
    }

    fn firecracker(jailer: Option<&str>) -> Firecracker {
        Firecracker {
            program: "/x/fc".into(),
            jailer: jailer.map(PathBuf::from),
            groups: cgroup::Groups::Unusable,
            depends_on: String::new(),
        }
    }

    /// Makes the jail of a VM that boots in `directory`.
    fn make(firecracker: &Firecracker, directory: &Path) -> Jail {
        let id = SandboxId::from_entropy([7; 8]);
        let machine = serde_json::json!({ "cpus": 1, "memory_mib": 64, "memory": null });
        let machine = serde_json::from_value(machine).unwrap();
        let source = Source::Snapshot(directory);
        let launch = Launch { id, directory, machine: &machine, tap: None, source };
        Jail::make(firecracker, &launch).unwrap()
    }

    #[test]
    fn jailed_files_are_owned_or_readable_and_never_links() {
        if !rustix::process::geteuid().is_root() {
            skip("firecracker's jail", "only root's Firecracker is jailed");
            return;
        }
        let directory = made();
        let file = |name: &str| directory.path().join(name);
        for name in ["disk", "memory"] {
            fs::write(file(name), name).unwrap();
            fs::set_permissions(file(name), Permissions::from_mode(0o600)).unwrap();
        }
        symlink(file("memory"), file("link")).unwrap();
        let id = SandboxId::from_entropy([7; 8]);
        let jail = make(&firecracker(Some("/x/jailer")), directory.path());

        jail.admit(&file("disk"), "disk", Use::Own).unwrap();
        jail.admit(&file("link"), "memory", Use::Shared).unwrap();

        let inside = |name: &str| fs::symlink_metadata(jail.root.join(name)).unwrap();
        assert_eq!((inside("disk").uid(), inside("disk").mode() & 0o777), (user_of(id), 0o600));
        assert!(inside("memory").is_file());
        assert_eq!((inside("memory").uid(), inside("memory").mode() & 0o777), (0, 0o644));
        let place = file("jail").join("fc").join(vm_name(id)).join("root");
        assert_eq!(fs::canonicalize(place).unwrap(), fs::canonicalize(&jail.root).unwrap());
    }

    #[tokio::test]
    async fn new_jail_has_no_files_of_an_earlier_vmm() {
        let directory = made();
        fs::write(root(directory.path()).join("left"), "").unwrap();

        clear(directory.path()).await.unwrap();
        let jail = make(&firecracker(None), directory.path());

        assert_eq!(fs::read_dir(root(directory.path())).unwrap().count(), 0);
        fs::write(directory.path().join("disk"), "disk").unwrap();
        jail.admit(&directory.path().join("disk"), "name", Use::Own).unwrap();
        assert_eq!(fs::read(root(directory.path()).join("name")).unwrap(), b"disk");
        expel(directory.path(), "name").unwrap();
        expel(directory.path(), "name").unwrap();
        clear(directory.path()).await.unwrap();
        assert!(!root(directory.path()).exists() && directory.path().join("disk").exists());
    }
}
