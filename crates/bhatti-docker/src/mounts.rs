//! Volumes: their file systems are mounted on this host, and the container is given the mounts.
//!
//! Whatever removes the sandbox's directory must not reach into a volume: a place is taken away only once nothing is mounted there.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bhatti_engine::{RemoveError, VolumeFile};
use bhatti_host::process::command;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

const DIRECTORY: &str = "mounts";

/// A volume that is mounted on this host.
#[derive(Clone, Debug)]
pub(crate) struct Mounted {
    /// Where, on this host.
    pub(crate) here: PathBuf,
    /// Where, in the container.
    pub(crate) there: String,
    pub(crate) read_only: bool,
}

/// Where the volumes of a sandbox will be.
pub(crate) fn places(directory: &Path, volumes: &[Option<VolumeFile>]) -> Vec<Mounted> {
    let place = |(number, volume): (usize, &Option<VolumeFile>)| {
        let volume = volume.as_ref()?;
        Some(Mounted {
            here: directory.join(DIRECTORY).join(number.to_string()),
            there: volume.mount.clone(),
            read_only: volume.read_only,
        })
    };
    volumes.iter().enumerate().filter_map(place).collect()
}

/// Mounts the volumes of a sandbox.
pub(crate) async fn make(directory: &Path, volumes: &[Option<VolumeFile>]) -> io::Result<()> {
    let files = volumes.iter().flatten().map(|volume| &volume.path);
    for (file, place) in files.zip(places(directory, volumes)) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&place.here)?;
        let access = if place.read_only { "ro" } else { "rw" };
        let options = format!("loop,nosuid,nodev,noatime,{access}");
        let mut mount = command("mount");
        mount.args(["-t", "ext4", "-o", &options]).args([file, &place.here]);
        let output = mount.output().await?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(io::Error::other(said));
        }
    }
    Ok(())
}

/// Takes the mounts away, and writes what they have.
pub(crate) async fn remove(directory: &Path) -> Result<(), RemoveError> {
    let directory = directory.join(DIRECTORY);
    let at = directory.clone();
    let removed = tokio::task::spawn_blocking(move || remove_all(&directory)).await;
    removed
        .map_err(io::Error::other)
        .and_then(|removed| removed)
        .map_err(|source| RemoveError::Files { path: at, source })
}

fn remove_all(directory: &Path) -> io::Result<()> {
    let places = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        places => places?,
    };
    for place in places {
        let place = place?.path();
        loop {
            match unmount(&place, UnmountFlags::NOFOLLOW) {
                Ok(()) => {}
                // Nothing is mounted there.
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        fs::remove_dir(place)?;
    }
    fs::remove_dir(directory)
}
