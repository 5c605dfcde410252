//! Volumes that this host's kernel may mount, as it does for containers.
//!
//! ext4 makes no promise about a file system that was crafted to harm it. A guest with a disk of
//! its own may have written any bytes, so its clean flag proves nothing. e2fsck therefore checks
//! all of such a volume once, and a file beside it records that. An engine whose guests get the
//! disk removes the record first.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::blocking;
use bhatti_host::durable;
use tokio::time::timeout;

use super::file::{self, CHECK_LIMIT, VolumeFileError, failed};
use super::on_thread;

/// The record, beside a volume's file: e2fsck found it sound, and only hosts have written it since.
const CHECKED: &str = "checked";

fn record(volume: &Path) -> PathBuf {
    volume.with_file_name(CHECKED)
}

/// Makes a volume ready to be mounted by this host's kernel. The check goes on if the caller stops
/// waiting, and the next caller finds its record.
///
/// # Errors
///
/// Returns [`VolumeFileError::Damaged`] if it is beyond repair. A read-only volume is not
/// repaired, because it may be mounted already.
pub(super) async fn settle_for_host(volume: &Path, read_only: bool) -> Result<(), VolumeFileError> {
    let volume = volume.to_owned();
    let settled = tokio::spawn(async move {
        let held = file::hold(&volume).await?;
        file::settle_held(&held).await?;
        if record(&volume).exists() {
            return Ok(());
        }
        if !file::is_sound(&held).await? {
            if read_only {
                let message = "errors found; attach the volume for writing to have it repaired";
                return Err(VolumeFileError::Damaged { message: message.to_owned() });
            }
            file::repair(&held).await?;
        }
        blocking(|| File::create(record(&volume))).map_err(failed("record the volume's check"))?;
        Ok(())
    });
    match timeout(CHECK_LIMIT, settled).await {
        Ok(Ok(settled)) => settled,
        Ok(Err(_)) | Err(_) => Err(VolumeFileError::Slow),
    }
}

/// Records that a guest may write any bytes of the volume from now on. The record is on the disk
/// before the guest runs.
pub(super) async fn distrust(volume: &Path) -> io::Result<()> {
    let record = record(volume);
    on_thread(move || match fs::remove_file(&record) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| durable::sync_parent(&record)),
    })
    .await
}

#[cfg(test)]
mod tests {
    use bhatti_host::process;
    use bhatti_types::VolumeMib;

    use super::*;

    /// Writes into a volume as a guest with the disk can: the clean flag stays.
    async fn forge(volume: &Path, request: &str) {
        let mut debugfs = process::command("debugfs");
        let done = debugfs.args(["-w", "-R", request]).arg(volume).output().await.unwrap();
        assert!(done.status.success(), "{done:?}");
        file::settle(volume).await.unwrap();
    }

    #[tokio::test]
    async fn clean_flag_is_not_trusted_before_this_host_mounts_a_volume() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join(super::super::FILE);
        file::make(&volume, VolumeMib::try_from(64).unwrap()).await.unwrap();
        let whole = fs::read(&volume).unwrap();
        settle_for_host(&volume, false).await.unwrap();
        assert!(fs::read(&volume).unwrap() == whole, "a sound volume is only read");

        distrust(&volume).await.unwrap();
        forge(&volume, "freei <11>").await;
        let refused = settle_for_host(&volume, true).await.unwrap_err();
        assert!(matches!(refused, VolumeFileError::Damaged { .. }), "{refused}");
        settle_for_host(&volume, false).await.unwrap();
        settle_for_host(&volume, true).await.unwrap();

        distrust(&volume).await.unwrap();
        forge(&volume, "clri <2>").await;
        let refused = settle_for_host(&volume, false).await.unwrap_err();
        assert!(matches!(refused, VolumeFileError::Damaged { .. }), "{refused}");
    }

    #[tokio::test]
    async fn volume_is_checked_once_for_as_long_as_only_hosts_write_it() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join(super::super::FILE);
        file::make(&volume, VolumeMib::try_from(64).unwrap()).await.unwrap();
        settle_for_host(&volume, false).await.unwrap();
        forge(&volume, "clri <2>").await;

        // With the record, the volume is not checked again.
        settle_for_host(&volume, false).await.unwrap();
        distrust(&volume).await.unwrap();
        distrust(&volume).await.unwrap();

        settle_for_host(&volume, false).await.unwrap_err();
    }
}
