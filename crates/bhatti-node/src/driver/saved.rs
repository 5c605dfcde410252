//! The snapshot of a sleeping sandbox, in the sandbox's directory.
//!
//! ```text
//!  snapshot/           can be restored
//!  snapshot.used/      was loaded by a VM that has not run yet: it is put back if that VM is gone
//!  snapshot.used/ran   its VM was about to run, so the disk may be newer: never restored again
//!  snapshot.gone/      is being removed
//! ```
//!
//! `ran` is on the disk before the VM runs. The disk's size and time of change cannot tell whether
//! the VM ran: a power cut takes back changes of them that were not flushed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::durable;
use tokio::task::spawn_blocking;

pub(crate) const SNAPSHOT: &str = "snapshot";
const USED: &str = "snapshot.used";
const RAN: &str = "ran";
const GONE: &str = "snapshot.gone";

/// The snapshot of one sandbox. Its async functions do disk work on a thread for blocking work;
/// the others block their caller.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    directory: PathBuf,
}

impl Saved {
    pub(crate) const fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Returns whether there is a snapshot that can be restored.
    pub(crate) fn is_there(&self) -> bool {
        self.path(SNAPSHOT).exists()
    }

    /// Takes the snapshot out of use, if there is one, because a VM has loaded it. Returns whether
    /// there is one.
    pub(crate) async fn consume(&self) -> io::Result<bool> {
        self.on_disk(|saved| {
            if !saved.is_there() {
                return Ok(false);
            }
            // A used snapshot that an earlier wake could not remove.
            saved.remove_used()?;
            fs::rename(saved.path(SNAPSHOT), saved.path(USED))?;
            Ok(true)
        })
        .await
    }

    /// Records durably that the VM that has loaded the snapshot runs from now on.
    pub(crate) async fn note_run(&self) -> io::Result<()> {
        self.on_disk(|saved| {
            let ran = saved.path(USED).join(RAN);
            File::create(&ran)?;
            durable::sync_parent(&ran)?;
            durable::sync_parent(&saved.path(USED))
        })
        .await
    }

    /// Puts back a used snapshot whose VM did not run after all.
    pub(crate) async fn put_back(&self) -> io::Result<()> {
        self.on_disk(Self::put_back_now).await
    }

    fn put_back_now(&self) -> io::Result<()> {
        let ran = self.path(USED).join(RAN);
        if ran.exists() {
            fs::remove_file(&ran)?;
            durable::sync_parent(&ran)?;
        }
        durable::rename(&self.path(USED), &self.path(SNAPSHOT))
    }

    /// Removes a used snapshot.
    pub(crate) async fn forget(&self) -> io::Result<()> {
        self.on_disk(Self::remove_used).await
    }

    /// Removes a snapshot that could be restored, because a VM has run since.
    pub(crate) async fn discard(&self) -> io::Result<()> {
        self.on_disk(|saved| saved.remove(SNAPSHOT)).await
    }

    fn remove_used(&self) -> io::Result<()> {
        self.remove(USED)
    }

    /// Removes a snapshot, under another name first: a half removed snapshot must not be taken for
    /// a whole one.
    fn remove(&self, name: &str) -> io::Result<()> {
        let gone = self.path(GONE);
        remove_directory(&gone)?;
        match fs::rename(self.path(name), &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed?,
        }
        remove_directory(&gone)
    }

    /// Cleans up the snapshots of a sandbox without a VM, after an earlier daemon. Puts a used
    /// snapshot back if its VM never ran. Returns whether there is a snapshot to restore.
    pub(crate) fn settle(&self) -> io::Result<bool> {
        remove_directory(&self.path(GONE))?;
        let used = self.path(USED);
        if used.exists() {
            if !self.is_there() && !used.join(RAN).exists() {
                self.put_back_now()?;
            } else {
                self.remove_used()?;
            }
        }
        Ok(self.is_there())
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let saved = self.clone();
        spawn_blocking(move || work(&saved)).await.map_err(io::Error::other)?
    }
}

fn remove_directory(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(with: &[&str]) -> (tempfile::TempDir, Saved) {
        let directory = tempfile::tempdir().unwrap();
        for name in with {
            fs::create_dir_all(directory.path().join(name)).unwrap();
        }
        let saved = Saved::new(directory.path().to_owned());
        (directory, saved)
    }

    fn names(directory: &tempfile::TempDir) -> Vec<String> {
        let entries = fs::read_dir(directory.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[tokio::test]
    async fn snapshot_is_put_back_only_as_long_as_its_vm_did_not_run() {
        let (directory, saved) = place(&[SNAPSHOT]);
        assert!(saved.consume().await.unwrap());
        assert!(saved.settle().unwrap(), "its VM did not run");

        assert!(saved.consume().await.unwrap());
        saved.note_run().await.unwrap();
        saved.put_back().await.unwrap();
        assert!(saved.settle().unwrap(), "its VM was not resumed");

        assert!(saved.consume().await.unwrap());
        saved.note_run().await.unwrap();
        assert!(!saved.settle().unwrap(), "its VM ran");
        assert_eq!(names(&directory), [""; 0]);
        assert!(!saved.consume().await.unwrap());
    }

    #[test]
    fn what_was_being_removed_is_never_taken_for_a_snapshot() {
        for with in [&[GONE][..], &[USED, "snapshot.used/ran"], &[GONE, USED, "snapshot.used/ran"]]
        {
            let (directory, saved) = place(with);

            assert!(!saved.settle().unwrap());

            assert_eq!(names(&directory), [""; 0], "{with:?}");
        }
    }

    #[test]
    fn snapshot_of_a_later_end_wins() {
        let (directory, saved) = place(&[SNAPSHOT, USED]);

        assert!(saved.settle().unwrap());

        assert_eq!(names(&directory), [SNAPSHOT]);
    }
}
