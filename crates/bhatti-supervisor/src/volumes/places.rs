//! The volumes of one sandbox, each in its place: the first is the guest's disk `volume0`.

use std::path::{Path, PathBuf};

use bhatti_engine::{FileCopy, VolumeFile};
use bhatti_proto::ConfigVolume;
use bhatti_store::{Attach, AttachKind, Attachment};
use bhatti_types::{SandboxId, VolumeId, VolumeName};

use super::FILE;
use super::file::{self, VolumeFileError, create_private};
use super::trust;
use crate::Shared;
use crate::driver::directory;

/// A sandbox cannot have its volumes.
#[derive(Debug, thiserror::Error)]
pub enum VolumeUseError {
    /// The file of one is gone.
    #[error("the file of volume `{0}` is gone")]
    Missing(VolumeName),
    /// The file of one could not be made or checked.
    #[error("volume `{name}` cannot be used")]
    File {
        /// The volume.
        name: VolumeName,
        /// Why.
        #[source]
        source: VolumeFileError,
    },
}

/// Where a sandbox's own volumes come from, and whether the others may have been left in disorder.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OwnVolumes<'a> {
    /// They are made.
    Fresh,
    /// They are copied from a snapshot.
    Saved(&'a Path),
    /// They are there, and the guest's memory of them goes on.
    Kept,
    /// They are there, and the guest will look at them anew.
    Left,
}

/// The places for so many volumes: few shapes of machines, for each has a template of its own.
pub(crate) const fn places(volumes: usize) -> usize {
    match volumes {
        0 => 0,
        some => some.next_power_of_two(),
    }
}

pub(super) fn named_file(shared: &Shared, id: VolumeId) -> PathBuf {
    shared.config.volumes_dir.join(id.to_string()).join(FILE)
}

fn own_name(place: usize) -> String {
    format!("volume-{place}.ext4")
}

fn file_of(shared: &Shared, id: SandboxId, place: usize, volume: &Attachment) -> PathBuf {
    match volume.volume {
        Some(volume) => named_file(shared, volume),
        None => directory(shared, id).join(own_name(place)),
    }
}

/// The files of a sandbox's volumes, ready to be used, in their places.
pub(crate) async fn files(
    shared: &Shared,
    id: SandboxId,
    volumes: &[Attachment],
    own: OwnVolumes<'_>,
) -> Result<Vec<Option<VolumeFile>>, VolumeUseError> {
    let shares_kernel = shared.engine.capabilities().shares_kernel;
    let mut files = vec![None; places(volumes.len())];
    for (place, volume) in volumes.iter().enumerate() {
        let path = file_of(shared, id, place, volume);
        let failed = |source| VolumeUseError::File { name: volume.name.clone(), source };
        if volume.volume.is_none() {
            make_own(&path, place, volume, own).await.map_err(failed)?;
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
            distrusted.map_err(file::failed("forget the volume's check")).map_err(failed)?;
        }
        files[place] =
            Some(VolumeFile { path, read_only: volume.read_only, mount: volume.mount.to_string() });
    }
    Ok(files)
}

async fn make_own(
    path: &Path,
    place: usize,
    volume: &Attachment,
    own: OwnVolumes<'_>,
) -> Result<(), VolumeFileError> {
    if matches!(own, OwnVolumes::Kept | OwnVolumes::Left) {
        return Ok(());
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    create_private(directory).map_err(|source| VolumeFileError::File {
        step: "create the sandbox's directory",
        source,
    })?;
    match own {
        OwnVolumes::Saved(snapshot) => file::copy(&snapshot.join(own_name(place)), path).await,
        _ => file::make(path, volume.size).await,
    }
}

/// What others are made from, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MadeFrom {
    /// A sandbox that goes on, at once: what it only reads stays what it is.
    Running,
    /// Something that is kept for any time.
    Kept,
}

impl MadeFrom {
    /// Whether whoever is made of it has a copy of a volume.
    const fn copies(self, volume: &Attachment) -> bool {
        matches!(self, Self::Kept) || !volume.read_only
    }
}

/// What of a sandbox's volumes goes into a snapshot from which others are made.
pub(crate) fn copies(
    shared: &Shared,
    id: SandboxId,
    volumes: &[Attachment],
    made_from: MadeFrom,
) -> Vec<FileCopy> {
    let written = volumes.iter().enumerate().filter(|(_, volume)| made_from.copies(volume));
    let copy = |(place, volume)| FileCopy {
        from: file_of(shared, id, place, volume),
        name: own_name(place),
    };
    written.map(copy).collect()
}

/// The volumes of a sandbox that is made from another: copies of its own, as they were then, or what they share.
pub(crate) fn of_fork(volumes: &[Attachment], made_from: MadeFrom) -> Vec<Attach> {
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

/// What a sandbox's guest is told of its volumes.
pub(crate) fn of_guest(volumes: &[Attachment]) -> Vec<ConfigVolume> {
    let told = |(place, volume): (usize, &Attachment)| ConfigVolume {
        device: format!("/dev/disk/by-id/virtio-volume{place}"),
        mount: volume.mount.to_string(),
        fs: "ext4".to_owned(),
        read_only: volume.read_only,
    };
    volumes.iter().enumerate().map(told).collect()
}
