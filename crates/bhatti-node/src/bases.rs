//! Base snapshots: for each image and shape, a snapshot of a booted guest from which sandboxes are
//! forked.
//!
//! A base snapshot is a snapshot in `<base snapshots>/<key>`. The key is a hash of all that the
//! snapshot depends on: files that are named by their content, the shape, the VMM. So a base
//! snapshot is never changed and never out of date. The least recently used one is removed first.

mod make;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bhatti_agent::CallError;
use bhatti_engine::{BootError, RestoreError, SnapshotError, VmmError};
use bhatti_host::blocking;
use bhatti_image::BootFiles;
use bhatti_types::{CpuCount, DiskMib, MemoryMib, Report, UserId};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tracing::{error, info, warn};

use crate::Shared;
use crate::admission::Busy;
use crate::turns::Turns;

pub(crate) use make::run_if_there;

/// Number of base snapshots that a daemon makes at once.
const MAKERS: usize = 2;

/// Lock file that every maker of a base snapshot locks shared. A daemon that removes unfinished
/// base snapshots locks it exclusively.
const LOCK: &str = ".lock";
/// Prefix of the lock file of a single base snapshot, before the key.
const KEY_LOCK: &str = ".lock-";

/// Share of the budget that the base snapshots made for one user may take: one part of this many.
/// Those in use stay even beyond it.
const OWNERS_SHARE: u64 = 4;

/// Base snapshots are made only for memory and disk sizes that are multiples of these steps, in
/// MiB. Without steps, their number would have no bound.
const MEMORY_STEP_MIB: u32 = 64;
const DISK_STEP_MIB: u32 = 1024;

/// Prefix of the directories of base snapshots that are being made.
const MAKING: &str = ".make-";

/// A base snapshot could not be made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The guest did not boot.
    #[error("failed to boot a guest for the base snapshot")]
    Boot(#[from] BootError),
    /// The agent failed.
    #[error("failed to prepare the base snapshot's guest")]
    Agent(#[from] CallError),
    /// The guest could not be started from a snapshot before its root disk.
    #[error("failed to start a guest from a snapshot before its root disk")]
    Start(#[from] RestoreError),
    /// The VM could not be paused.
    #[error("failed to pause the base snapshot's guest")]
    Pause(#[from] VmmError),
    /// The snapshot could not be saved.
    #[error("failed to save the base snapshot")]
    Save(#[from] SnapshotError),
    /// A file could not be made.
    #[error("failed to make the file of an empty root disk")]
    NoRoot(#[source] io::Error),
    /// The lock files, which keep out other makers, could not be locked.
    #[error("failed to lock the base snapshots")]
    Lock(#[source] io::Error),
    /// No memory is free.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The base snapshot was removed again, or the daemon is stopping.
    #[error("the base snapshot was removed, or the daemon is stopping")]
    Interrupted,
    /// This host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy(#[from] getrandom::Error),
}

/// The inputs of a base snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    pub(crate) files: BootFiles,
    pub(crate) cpus: CpuCount,
    pub(crate) memory: MemoryMib,
    /// The size of the root disk; that of the image if absent.
    pub(crate) disk: Option<DiskMib>,
    /// Whether there is a network card.
    pub(crate) has_network: bool,
    /// The number of slots for volumes.
    pub(crate) slots: usize,
}

impl Recipe {
    /// Returns whether the memory and disk sizes are multiples of the steps. Only then a base
    /// snapshot is made if there is none.
    pub(crate) fn is_usual(&self) -> bool {
        self.memory.get().is_multiple_of(MEMORY_STEP_MIB)
            && self.disk.is_none_or(|disk| disk.get().is_multiple_of(DISK_STEP_MIB))
    }
}

/// The base snapshots of a daemon.
pub(crate) struct Bases {
    directory: PathBuf,
    budget_bytes: u64,
    /// Lets one task at a time make the base snapshot of a key.
    making: Turns<String>,
    /// The daemon makes one base snapshot at a time for a user. A user who asks for many shapes
    /// waits for them; other users do not.
    making_for: Turns<UserId>,
    /// Limits how many base snapshots are made at once: each boots a guest.
    makers: Semaphore,
    /// The user for whom this daemon has made each base snapshot, by key.
    made_for: Mutex<HashMap<String, UserId>>,
}

/// A base snapshot that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) key: String,
    pub(crate) directory: PathBuf,
    /// Whether it has a network card.
    pub(crate) has_network: bool,
    /// Distinguishes it from a base snapshot that was made anew in the same directory.
    inode: u64,
}

impl Base {
    /// Notes the time of the last use, which decides which base snapshot is evicted first. The base
    /// snapshot works without it.
    fn note_use(&self) {
        drop(blocking(|| File::open(&self.directory)?.set_modified(SystemTime::now())));
    }
}

impl Bases {
    pub(crate) fn new(directory: PathBuf, budget_bytes: u64) -> Self {
        Self {
            directory,
            budget_bytes,
            making: Turns::default(),
            making_for: Turns::default(),
            makers: Semaphore::new(MAKERS),
            made_for: Mutex::default(),
        }
    }

    /// Returns the base snapshot of a recipe, if there is one.
    pub(crate) fn find(&self, shared: &Shared, recipe: &Recipe) -> Option<Base> {
        let key = key(&shared.engine.capabilities().machine, recipe);
        self.existing(&key, recipe)
    }

    fn existing(&self, key: &str, recipe: &Recipe) -> Option<Base> {
        let directory = self.directory.join(key);
        let inode = inode_of(&directory)?;
        Some(Base { key: key.to_owned(), directory, has_network: recipe.has_network, inode })
    }

    /// Returns the base snapshot of a recipe. If there is none, makes it for `owner` in a task of
    /// its own, which continues if the caller is canceled.
    pub(crate) async fn get(
        &self,
        shared: &Arc<Shared>,
        owner: UserId,
        recipe: &Recipe,
    ) -> Result<Base, BaseError> {
        let key = key(&shared.engine.capabilities().machine, recipe);
        let base = match blocking(|| self.existing(&key, recipe)) {
            Some(base) => base,
            None => {
                let (shared, recipe) = (Arc::clone(shared), recipe.clone());
                let made =
                    tokio::spawn(async move { make_first(&shared, owner, &recipe, &key).await });
                made.await.map_err(|_| BaseError::Interrupted)??
            }
        };
        base.note_use();
        Ok(base)
    }

    /// Removes a base snapshot that proved to be unusable, unless it was made anew already.
    pub(crate) async fn discard(&self, base: &Base) {
        let _turn = self.making.take(base.key.clone()).await;
        if blocking(|| inode_of(&base.directory)) == Some(base.inode) {
            warn!(base = base.key, "Removing a base snapshot that cannot be used");
            blocking(|| self.remove(&base.directory));
        }
    }

    /// Removes the base snapshots that an earlier daemon left unfinished.
    pub(crate) async fn recover(&self, shared: &Shared) -> io::Result<()> {
        // If a base snapshot is being made right now, by a set-up or by a daemon that shares the
        // directory, its files must stay.
        let lock = blocking(|| File::create(self.directory.join(LOCK)))?;
        if lock.try_lock().is_err() {
            return Ok(());
        }
        for entry in blocking(|| fs::read_dir(&self.directory))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(id) = name.strip_prefix(MAKING).and_then(|id| id.parse().ok()) {
                if let Err(left) = shared.engine.remove(id, &entry.path()).await {
                    error!(base = name, error = %Report(&left), "Failed to remove an unfinished base snapshot");
                }
            } else if name.ends_with(".tmp") || name.ends_with(".gone") {
                blocking(|| self.remove(&entry.path()));
            } else if name.starts_with(KEY_LOCK) {
                blocking(|| fs::remove_file(entry.path()))?;
            }
        }
        Ok(())
    }

    /// Removes the least recently used base snapshots. Unless `owner` is the admin, removes those
    /// made for `owner` until they fit the owner's share of the budget. Then removes any until all
    /// fit the budget. Never removes `kept`, nor one on which a VM stands, because that would free
    /// nothing.
    fn evict(&self, kept: &str, owner: UserId) {
        if owner != UserId::ADMIN {
            let share = self.budget_bytes / OWNERS_SHARE;
            self.evict_of(kept, share, |key| self.made_for.lock().get(key) == Some(&owner));
        }
        self.evict_of(kept, self.budget_bytes, |_| true);
    }

    fn evict_of(&self, kept: &str, budget_bytes: u64, counts: impl Fn(&str) -> bool) {
        let mut others = match self.usage() {
            Ok(bases) => bases,
            Err(error) => {
                warn!(%error, "Failed to list the base snapshots for eviction");
                return;
            }
        };
        others.retain(|usage| counts(&usage.key()));
        let mut bytes: u64 = others.iter().map(|usage| usage.bytes).sum();
        others.sort_by_key(|usage| usage.used);
        for usage in others {
            if bytes <= budget_bytes {
                return;
            }
            if usage.shared || usage.directory.ends_with(kept) {
                continue;
            }
            info!(base = %usage.directory.display(), bytes = usage.bytes, "Evicting the least recently used base snapshot");
            self.remove(&usage.directory);
            self.made_for.lock().remove(&usage.key());
            bytes -= usage.bytes;
        }
    }

    fn usage(&self) -> io::Result<Vec<Usage>> {
        let mut bases = Vec::new();
        for entry in blocking(|| fs::read_dir(&self.directory))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().contains('.') {
                continue;
            }
            let mut usage = Usage {
                directory: entry.path(),
                used: entry.metadata()?.modified()?,
                bytes: 0,
                shared: false,
            };
            for file in fs::read_dir(entry.path())? {
                let (file, name) = file.map(|file| (file.metadata(), file.file_name()))?;
                let (file, name) = (file?, name.to_string_lossy().into_owned());
                if name.ends_with(".ext4") {
                    continue;
                }
                usage.bytes += file.blocks() * 512;
                usage.shared |= file.nlink() > 1;
            }
            bases.push(usage);
        }
        Ok(bases)
    }

    /// Removes a base snapshot. Renames its directory first, so that a half removed directory is
    /// never taken for a base snapshot.
    fn remove(&self, directory: &Path) {
        let gone = directory.with_extension("gone");
        let removed = match fs::rename(directory, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            renamed => renamed.and_then(|()| fs::remove_dir_all(&gone)),
        };
        if let Err(error) = removed {
            warn!(path = %directory.display(), %error, "Failed to remove a base snapshot");
        }
    }
}

fn inode_of(directory: &Path) -> Option<u64> {
    Some(fs::metadata(directory).ok()?.ino())
}

struct Usage {
    directory: PathBuf,
    used: SystemTime,
    bytes: u64,
    shared: bool,
}

impl Usage {
    fn key(&self) -> String {
        self.directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

fn key(machine: &str, recipe: &Recipe) -> String {
    let disk = recipe.disk.map_or_else(String::new, |disk| disk.to_string());
    key_of(machine, recipe, [&name(&recipe.files.root), &disk])
}

/// Returns the key of what a recipe and a root disk define.
fn key_of(machine: &str, recipe: &Recipe, root: [&str; 2]) -> String {
    let Recipe { files, cpus, memory, has_network, slots, .. } = recipe;
    // The kernel's directory is named by its content, and the other files are named by theirs.
    let kernel = files.kernel.parent().map(name).unwrap_or_default();
    let text = [
        machine,
        &kernel,
        &name(&files.initramfs),
        root[0],
        &cpus.get().to_string(),
        &memory.get().to_string(),
        if *has_network { "network" } else { "no network" },
        &slots.to_string(),
        root[1],
    ]
    .join("\n");
    blake3::hash(text.as_bytes()).to_hex()[..32].to_owned()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Locks the making of the base snapshot `key` against other processes, and waits until none of
/// them makes it.
async fn lock(directory: &Path, key: &str) -> io::Result<[File; 2]> {
    let (any, path) = (directory.join(LOCK), directory.join(format!("{KEY_LOCK}{key}")));
    let locked = tokio::task::spawn_blocking(move || {
        let any = File::create(any)?;
        any.lock_shared()?;
        // No daemon removes the key's lock file while this shared lock is held.
        let this = File::create(path)?;
        this.lock()?;
        Ok([any, this])
    });
    locked.await.map_err(io::Error::other)?
}

/// Makes a base snapshot, unless another task or process has made it meanwhile.
async fn make_first(
    shared: &Arc<Shared>,
    owner: UserId,
    recipe: &Recipe,
    key: &str,
) -> Result<Base, BaseError> {
    let bases = &shared.bases;
    let _owners_turn = bases.making_for.take(owner).await;
    let _turn = bases.making.take(key.to_owned()).await;
    if let Some(base) = bases.existing(key, recipe) {
        return Ok(base);
    }
    let _others_turn = lock(&bases.directory, key).await.map_err(BaseError::Lock)?;
    if let Some(base) = bases.existing(key, recipe) {
        return Ok(base);
    }
    let _maker = bases.makers.acquire().await.map_err(|_| BaseError::Interrupted)?;
    make::make(shared, owner, recipe, key).await?;
    bases.made_for.lock().insert(key.to_owned(), owner);
    bases.evict(key, owner);
    bases.existing(key, recipe).ok_or(BaseError::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Creates a base snapshot of 1 MiB, last used `used` seconds after a fixed time.
    fn base(directory: &Path, key: &str, used: u64) -> PathBuf {
        let base = directory.join(key);
        fs::create_dir(&base).unwrap();
        fs::write(base.join("memory-1.img"), vec![1; usize::try_from(MIB).unwrap()]).unwrap();
        // The image belongs to the image store, so it does not count.
        fs::write(base.join("rootfs.ext4"), vec![1; usize::try_from(8 * MIB).unwrap()]).unwrap();
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + used);
        File::open(&base).unwrap().set_modified(time).unwrap();
        base
    }

    #[test]
    fn least_recently_used_base_snapshots_are_evicted_unless_in_use() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("templates");
        fs::create_dir(&directory).unwrap();
        let used = base(&directory, "used", 0);
        fs::hard_link(used.join("memory-1.img"), place.path().join("of-a-fork")).unwrap();
        for (key, when) in [("new", 1), ("old", 2), ("older", 3), ("recent", 4)] {
            base(&directory, key, when);
        }
        fs::write(directory.join(LOCK), "").unwrap();
        // Room for three base snapshots, and a little for the directories themselves.
        let bases = Bases::new(directory.clone(), 3 * MIB + MIB / 2);

        bases.evict("new", UserId::ADMIN);

        let mut left: Vec<String> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [".lock", "new", "recent", "used"]);
    }

    #[test]
    fn user_over_its_share_evicts_only_its_own_base_snapshots() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().to_owned();
        let greedy = UserId::from_entropy([7; 8]);
        let bases = Bases::new(directory.clone(), 12 * MIB);
        base(&directory, "others", 0);
        for number in 1..=5 {
            let key = format!("greedy-{number}");
            base(&directory, &key, number);
            bases.made_for.lock().insert(key, greedy);
        }

        bases.evict("greedy-5", greedy);

        let mut left: Vec<String> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        // The user's share is 3 MiB.
        assert_eq!(left, ["greedy-3", "greedy-4", "greedy-5", "others"]);
        assert_eq!(bases.made_for.lock().len(), 3);
    }

    #[test]
    fn key_depends_on_every_input() {
        let files = BootFiles {
            kernel: "/data/kernel-1/vmlinux".into(),
            initramfs: "/data/initramfs-1.cpio".into(),
            root: "/data/rootfs-1.ext4".into(),
        };
        let recipe = Recipe {
            files: files.clone(),
            cpus: CpuCount::ONE,
            memory: MemoryMib::DEFAULT,
            disk: None,
            has_network: true,
            slots: 0,
        };
        let same = BootFiles { kernel: "/elsewhere/kernel-1/vmlinux".into(), ..files.clone() };
        assert_eq!(key("m", &recipe), key("m", &Recipe { files: same, ..recipe.clone() }));
        let others = [
            key("other", &recipe),
            key("m", &Recipe { has_network: false, ..recipe.clone() }),
            key("m", &Recipe { slots: 1, ..recipe.clone() }),
            key("m", &Recipe { disk: DiskMib::try_from(8192).ok(), ..recipe.clone() }),
            key("m", &Recipe { cpus: CpuCount::try_from(2).unwrap(), ..recipe.clone() }),
            key("m", &Recipe { memory: MemoryMib::try_from(1024).unwrap(), ..recipe.clone() }),
            key(
                "m",
                &Recipe {
                    files: BootFiles { kernel: "/data/kernel-2/vmlinux".into(), ..files.clone() },
                    ..recipe.clone()
                },
            ),
            key(
                "m",
                &Recipe {
                    files: BootFiles {
                        initramfs: "/data/initramfs-2.cpio".into(),
                        ..files.clone()
                    },
                    ..recipe.clone()
                },
            ),
            key(
                "m",
                &Recipe {
                    files: BootFiles { root: "/data/rootfs-2.ext4".into(), ..files },
                    ..recipe.clone()
                },
            ),
            key("m", &recipe),
        ];
        let different: std::collections::HashSet<&String> = others.iter().collect();
        assert_eq!(different.len(), others.len());
    }
}
