//! The control group of a jailed VMM: a bound on what one that a guest has taken over could take of this host.
//!
//! What a sandbox is entitled to is the supervisor's to say, and the guest's kernel sees no more memory than it has. The group's limits only
//! hold what goes beyond that.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};

const MOUNT: &str = "/sys/fs/cgroup";
/// The group that those of all VMMs are in.
const PARENT: &str = "bhatti";

/// A VMM has a thread per vCPU and three more.
const MOST_TASKS: u32 = 64;
/// What a VMM may have beyond twice the guest's memory, in MiB. Twice: what is written of it, when it is saved, counts until it is on the disk.
const MEMORY_BEYOND_MIB: u64 = 256;

/// How long a process that has ended may take to leave its group, and how often to look.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
const LEAVE_PAUSE: Duration = Duration::from_millis(2);

/// The control groups of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Groups {
    /// Version 2, with the controllers that are needed.
    Unified,
    /// Version 1, a tree for each controller.
    Separate,
    /// None that help.
    Unusable,
}

impl Groups {
    /// Those of this host.
    pub(crate) fn of_host() -> Self {
        let mount = Path::new(MOUNT);
        let unified = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
        let has = |controller| unified.split_whitespace().any(|one| one == controller);
        if has("memory") && has("pids") {
            Self::Unified
        } else if mount.join("memory/tasks").exists() && mount.join("pids/tasks").exists() {
            Self::Separate
        } else {
            Self::Unusable
        }
    }
}

/// What the jailer is told, for a guest with so much memory.
pub(crate) fn arguments(groups: Groups, memory_mib: u32) -> Vec<String> {
    let memory = (2 * u64::from(memory_mib) + MEMORY_BEYOND_MIB) << 20;
    let (version, limit) = match groups {
        Groups::Unified => ("2", "memory.max"),
        Groups::Separate => ("1", "memory.limit_in_bytes"),
        Groups::Unusable => return Vec::new(),
    };
    let (memory, tasks) = (format!("{limit}={memory}"), format!("pids.max={MOST_TASKS}"));
    let all = [
        "--cgroup-version",
        version,
        "--parent-cgroup",
        PARENT,
        "--cgroup",
        &memory,
        "--cgroup",
        &tasks,
    ];
    all.map(str::to_owned).to_vec()
}

/// Removes the group `name`, whose process has ended.
pub(crate) async fn remove(name: &str) -> io::Result<()> {
    for tree in ["", "memory", "pids"] {
        remove_one(&Path::new(MOUNT).join(tree).join(PARENT).join(name)).await?;
    }
    Ok(())
}

async fn remove_one(place: &Path) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match fs::remove_dir(place) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.kind() == ErrorKind::ResourceBusy && began.elapsed() < LEAVE_LIMIT => {}
            removed => return removed,
        }
        sleep(LEAVE_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_told_in_the_words_of_each_version() {
        let unified = arguments(Groups::Unified, 512).join(" ");
        let limits = "--cgroup memory.max=1342177280 --cgroup pids.max=64";
        assert_eq!(unified, format!("--cgroup-version 2 --parent-cgroup bhatti {limits}"));
        let separate = arguments(Groups::Separate, 512).join(" ");
        assert!(separate.contains("--cgroup memory.limit_in_bytes=1342177280"), "{separate}");
        assert!(arguments(Groups::Unusable, 512).is_empty());
    }
}
