//! The volumes of one sandbox, each in its slot: slot 0 is the guest's disk `volume0`.

use std::path::{Path, PathBuf};

use bhatti_engine::{FileCopy, VolumeFile};
use bhatti_host::blocking;
use bhatti_proto::ConfigVolume;
use bhatti_store::{Attach, AttachKind, Attachment};
use bhatti_types::{SandboxId, VolumeName};

use super::file::{self, VolumeFileError, create_private};
use super::trust;
use crate::Shared;

/// A sandbox cannot use its volumes.
#[derive(Debug, thiserror::Error)]
pub enum VolumeUseError {
    /// A volume's file is missing.
    #[error("the file of volume `{0}` is missing")]
    Missing(VolumeName),
    /// A volume's file could not be made or checked.
    #[error("volume `{name}` cannot be used")]
    File {
        /// The volume.
        name: VolumeName,
        /// The cause.
        #[source]
        source: VolumeFileError,
    },
}

/// The source of a sandbox's own volumes, and whether the named ones may be inconsistent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OwnVolumes<'a> {
    /// They are made.
    Fresh,
    /// They are copied from a snapshot.
    Saved(&'a Path),
    /// They exist, and the guest's memory agrees with them.
    Kept,
    /// They exist, and the guest mounts them anew.
    Left,
}

/// Returns the number of slots for a number of volumes. It is a power of two: each shape of a
/// machine has a base snapshot of its own, so there should be few shapes.
pub(crate) const fn slots(volumes: usize) -> usize {
    match volumes {
        0 => 0,
        some => some.next_power_of_two(),
    }
}

fn own_name(slot: usize) -> String {
    format!("volume-{slot}.ext4")
}

fn file_of(shared: &Shared, id: SandboxId, slot: usize, volume: &Attachment) -> PathBuf {
    match volume.volume {
        Some(volume) => shared.volumes.file(volume),
        None => shared.directory(id).join(own_name(slot)),
    }
}

/// Returns the files of a sandbox's volumes, ready for use, by slot.
pub(crate) async fn files(
    shared: &Shared,
    id: SandboxId,
    volumes: &[Attachment],
    own: OwnVolumes<'_>,
) -> Result<Vec<Option<VolumeFile>>, VolumeUseError> {
    let shares_kernel = shared.engine.capabilities().shares_kernel;
    let mut files = vec![None; slots(volumes.len())];
    for (slot, volume) in volumes.iter().enumerate() {
        let path = file_of(shared, id, slot, volume);
        let failed = |source| VolumeUseError::File { name: volume.name.clone(), source };
        if volume.volume.is_none() {
            make_own(&path, slot, volume, own).await.map_err(failed)?;
        }
        if !path.exists() {
            return Err(VolumeUseError::Missing(volume.name.clone()));
        }
        let is_attached_now = volume.volume.is_some() && !matches!(own, OwnVolumes::Kept);
        if is_attached_now || matches!(own, OwnVolumes::Left) {
            let for_host = shares_kernel && volume.volume.is_some();
            let settled = if for_host {
                trust::settle_for_host(&path, volume.read_only).await
            } else {
                file::settle(&path).await
            };
            settled.map_err(failed)?;
        }
        if volume.volume.is_some() && !shares_kernel && !volume.read_only {
            let distrusted = trust::distrust(&path).await;
            distrusted
                .map_err(file::failed("remove the record of the volume's check"))
                .map_err(failed)?;
        }
        files[slot] =
            Some(VolumeFile { path, read_only: volume.read_only, mount: volume.mount.to_string() });
    }
    Ok(files)
}

async fn make_own(
    path: &Path,
    slot: usize,
    volume: &Attachment,
    own: OwnVolumes<'_>,
) -> Result<(), VolumeFileError> {
    if matches!(own, OwnVolumes::Kept | OwnVolumes::Left) {
        return Ok(());
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    blocking(|| create_private(directory)).map_err(|source| VolumeFileError::File {
        step: "create the sandbox's directory",
        source,
    })?;
    match own {
        OwnVolumes::Saved(snapshot) => file::copy(&snapshot.join(own_name(slot)), path).await,
        _ => file::make(path, volume.size).await,
    }
}

/// The source of new sandboxes, which decides whether they share read-only volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadeFrom {
    /// A sandbox that runs on: its forks share the volumes that it only reads.
    Running,
    /// A snapshot, which is kept: it has copies of all volumes.
    Kept,
}

impl MadeFrom {
    /// Returns whether a sandbox that is made from this gets a copy of a volume.
    const fn copies(self, volume: &Attachment) -> bool {
        matches!(self, Self::Kept) || !volume.read_only
    }
}

/// Returns the copies of a sandbox's volumes that belong into a snapshot.
pub(crate) fn copies(
    shared: &Shared,
    id: SandboxId,
    volumes: &[Attachment],
    made_from: MadeFrom,
) -> Vec<FileCopy> {
    let written = volumes.iter().enumerate().filter(|(_, volume)| made_from.copies(volume));
    let copy =
        |(slot, volume)| FileCopy { from: file_of(shared, id, slot, volume), name: own_name(slot) };
    written.map(copy).collect()
}

/// Returns the volumes of a sandbox that is made from another: copies of its own, or volumes that
/// both only read.
#[must_use]
pub fn volumes_of_fork(volumes: &[Attachment], made_from: MadeFrom) -> Vec<Attach> {
    let attach = |volume: &Attachment| Attach {
        name: volume.name.clone(),
        mount: volume.mount.clone(),
        kind: if made_from.copies(volume) {
            AttachKind::Own { size: volume.size, read_only: volume.read_only }
        } else {
            AttachKind::Named { read_only: true }
        },
    };
    volumes.iter().map(attach).collect()
}

/// Returns the volumes as they are in the guest's configuration.
pub(crate) fn of_guest(volumes: &[Attachment]) -> Vec<ConfigVolume> {
    let config = |(slot, volume): (usize, &Attachment)| ConfigVolume {
        device: format!("/dev/disk/by-id/virtio-volume{slot}"),
        mount: volume.mount.to_string(),
        fs: "ext4".to_owned(),
        read_only: volume.read_only,
    };
    volumes.iter().enumerate().map(config).collect()
}
