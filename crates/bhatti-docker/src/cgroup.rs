//! A container's CPU time and memory, read from its control group of version 1 or 2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bhatti_host::process::Usage;

const ROOT: &str = "/sys/fs/cgroup";

/// Returns the usage of the container whose first process is `pid`.
pub(crate) fn usage(pid: u32) -> io::Result<Usage> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let number = |path: PathBuf| -> io::Result<u64> {
        fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
    };
    if let (Some(memory), Some(cpu)) = (of(&groups, "memory"), of(&groups, "cpuacct")) {
        return Ok(Usage {
            cpu: Duration::from_nanos(number(cpu.join("cpuacct.usage"))?),
            memory_bytes: number(memory.join("memory.usage_in_bytes"))?,
        });
    }
    let group = unified(&groups).ok_or(io::ErrorKind::NotFound)?;
    let stat = fs::read_to_string(group.join("cpu.stat"))?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let used = used.and_then(|used| used.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Usage {
        cpu: Duration::from_micros(used),
        memory_bytes: number(group.join("memory.current"))?,
    })
}

/// Returns the group of `controller` in version 1, from lines such as `4:memory:/docker/0123`.
fn of(groups: &str, controller: &str) -> Option<PathBuf> {
    groups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let is_it = controllers.split(',').any(|one| one == controller);
        is_it.then(|| below(&Path::new(ROOT).join(controller), path))
    })
}

/// Returns the group of version 2, from a line such as `0::/docker/0123`.
fn unified(groups: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(below(Path::new(ROOT), path))
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_are_found() {
        let first = "5:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n0::/\n";
        assert_eq!(of(first, "memory"), Some("/sys/fs/cgroup/memory/docker/a".into()));
        assert_eq!(of(first, "cpuacct"), Some("/sys/fs/cgroup/cpuacct/docker/a".into()));
        let second = "0::/system.slice/docker-b.scope\n";
        assert_eq!(of(second, "memory"), None);
        let group = "/sys/fs/cgroup/system.slice/docker-b.scope";
        assert_eq!(unified(second), Some(group.into()));
    }
}
