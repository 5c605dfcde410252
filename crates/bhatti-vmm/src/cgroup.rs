//! The control group of a VMM: bounds the host resources that the VMM can take if a guest has
//! taken it over.
//!
//! `bhatti-control` enforces a sandbox's quota, and the guest's kernel sees no more memory than
//! the VM has. The group's limits only bound use beyond that.

use bhatti_host::blocking;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// The limit files, by the version of control groups.
const MEMORY_UNIFIED: &str = "memory.max";
const MEMORY_SEPARATE: &str = "memory.limit_in_bytes";
const TASKS: &str = "pids.max";

const MOUNT: &str = "/sys/fs/cgroup";
/// The parent of all VMMs' groups.
const PARENT: &str = "bhatti";

/// Maximum number of Firecracker's threads: one for each vCPU and three more.
const MOST_TASKS: u64 = 64;
/// Maximum number of QEMU's threads: one for each vCPU (32 at most), up to 64 for disk requests,
/// and some of its own. QEMU aborts if it cannot start a thread.
const MOST_TASKS_OF_QEMU: u64 = 192;
/// Memory that a VMM may take beyond twice the guest's memory, in MiB. Twice, because pages that
/// are written to a snapshot count until they are on the disk.
const MEMORY_BEYOND_MIB: u64 = 256;

/// How long an ended process may take to leave its group, and how often to check.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
const LEAVE_PAUSE: Duration = Duration::from_millis(2);

/// The kind of control groups on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Groups {
    /// Version 2, with the required controllers.
    Unified,
    /// Version 1, with one hierarchy for each controller.
    Separate,
    /// No usable control groups.
    Unusable,
}

impl Groups {
    /// Detects the control groups of this host.
    #[must_use]
    pub fn of_host() -> Self {
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

/// Returns the control group arguments of Firecracker's jailer for a guest with this memory.
#[must_use]
pub fn jailer_arguments(groups: Groups, memory_mib: u32) -> Vec<String> {
    let memory = memory_bytes(memory_mib);
    let (version, limit) = match groups {
        Groups::Unified => ("2", MEMORY_UNIFIED),
        Groups::Separate => ("1", MEMORY_SEPARATE),
        Groups::Unusable => return Vec::new(),
    };
    let (memory, tasks) = (format!("{limit}={memory}"), format!("{TASKS}={MOST_TASKS}"));
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

/// Returns the memory limit of a VMM, including its page cache, in bytes.
const fn memory_bytes(memory_mib: u32) -> u64 {
    (2 * memory_mib as u64 + MEMORY_BEYOND_MIB) << 20
}

/// Moves the process `pid` to the group `name`, which is created if missing, with limits for a
/// guest with this memory.
///
/// # Errors
///
/// Returns the kernel's error: the daemon is not root, or may not create groups. Blocks only on
/// the kernel.
pub fn enter(groups: Groups, name: &str, memory_mib: u32, pid: u32) -> io::Result<()> {
    let trees: &[(&str, &[(&str, u64)])] = match groups {
        Groups::Unified => {
            &[("", &[(MEMORY_UNIFIED, memory_bytes(memory_mib)), (TASKS, MOST_TASKS_OF_QEMU)])]
        }
        Groups::Separate => &[
            ("memory", &[(MEMORY_SEPARATE, memory_bytes(memory_mib))]),
            ("pids", &[(TASKS, MOST_TASKS_OF_QEMU)]),
        ],
        Groups::Unusable => return Ok(()),
    };
    for (tree, limits) in trees {
        let parent = Path::new(MOUNT).join(tree).join(PARENT);
        let group = parent.join(name);
        fs::create_dir_all(&group)?;
        if groups == Groups::Unified {
            // Enable the controllers on each level. Enabling them again is no error.
            for level in [Path::new(MOUNT), &parent] {
                fs::write(level.join("cgroup.subtree_control"), "+memory +pids")?;
            }
        }
        for (file, limit) in *limits {
            fs::write(group.join(file), limit.to_string())?;
        }
        fs::write(group.join("cgroup.procs"), pid.to_string())?;
    }
    Ok(())
}

/// Removes the group `name`, whose process has ended. A missing group is no error.
///
/// # Errors
///
/// Returns the error of rmdir(2), for example if a process is still in the group after five
/// seconds.
pub async fn remove(name: &str) -> io::Result<()> {
    for tree in ["", "memory", "pids"] {
        remove_one(&Path::new(MOUNT).join(tree).join(PARENT).join(name)).await?;
    }
    Ok(())
}

async fn remove_one(place: &Path) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match blocking(|| fs::remove_dir(place)) {
            Err(error)
                if error.kind() == ErrorKind::NotFound
                    || error.kind() == ErrorKind::NotADirectory =>
            {
                return Ok(());
            }
            Err(error)
                if error.kind() == ErrorKind::ResourceBusy && began.elapsed() < LEAVE_LIMIT => {}
            removed => return removed,
        }
        sleep(LEAVE_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;

    use bhatti_host::process::command;
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn jailer_arguments_match_the_cgroup_version() {
        let unified = jailer_arguments(Groups::Unified, 512).join(" ");
        let limits = "--cgroup memory.max=1342177280 --cgroup pids.max=64";
        assert_eq!(unified, format!("--cgroup-version 2 --parent-cgroup bhatti {limits}"));
        let separate = jailer_arguments(Groups::Separate, 512).join(" ");
        assert!(separate.contains("--cgroup memory.limit_in_bytes=1342177280"), "{separate}");
        assert!(jailer_arguments(Groups::Unusable, 512).is_empty());
    }

    /// Runs a Python program in a group for a guest without memory. The program starts once it is
    /// in the group.
    async fn run_in_group(name: &str, program: &str) -> Option<std::process::Output> {
        let mut shell = command("sh");
        shell.args(["-c", "read go; exec python3 -c \"$1\"", "sh", program]);
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        if let Err(error) = enter(Groups::of_host(), name, 0, shell.id().unwrap()) {
            bhatti_testkit::skip("limits of a control group", &error.to_string());
            return None;
        }
        shell.stdin.take().unwrap().write_all(b"go\n").await.unwrap();
        let ran = shell.wait_with_output().await.unwrap();
        remove(name).await.unwrap();
        Some(ran)
    }

    #[tokio::test]
    async fn group_limits_memory_and_threads() {
        let name = |what| format!("bhatti-test-{what}-{}", std::process::id());
        if Groups::of_host() == Groups::Unusable {
            bhatti_testkit::skip("limits of a control group", "no usable control groups");
            return;
        }
        let memory = format!("b'x' * ({} << 20)", MEMORY_BEYOND_MIB + 64);
        let Some(ran) = run_in_group(&name("memory"), &memory).await else { return };
        assert_eq!(ran.status.signal(), Some(9), "{ran:?}");

        let threads = "import threading, os\nstop = threading.Event()\ncount = 1\ntry:\n  \
            while count < 400:\n    threading.Thread(target=stop.wait).start()\n    count += 1\n\
            except RuntimeError:\n  pass\nprint(count, flush=True)\nos._exit(0)";
        let Some(ran) = run_in_group(&name("threads"), threads).await else { return };
        let count: u64 = String::from_utf8(ran.stdout).unwrap().trim().parse().unwrap();
        assert!((2..=MOST_TASKS_OF_QEMU).contains(&count), "{count} threads");
    }
}
