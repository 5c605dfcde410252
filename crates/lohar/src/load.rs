//! The load of the guest, as its kernel counts it.

use std::fs;

use bhatti_proto::LoadInfo;

use crate::Agent;

/// The time of all CPUs since the boot, in ticks of the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuTicks {
    all: u64,
    idle: u64,
}

impl CpuTicks {
    /// Reads the text of `/proc/stat`. Returns the ticks and the number of CPUs.
    fn read(stat: &str) -> (Self, u32) {
        let mut lines = stat.lines().take_while(|line| line.starts_with("cpu"));
        let sum = lines.next().unwrap_or_default();
        // The fields after the eighth are a part of the first two.
        let fields = sum.split_whitespace().skip(1).take(8);
        let fields: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
        let at = |place: usize| fields.get(place).copied().unwrap_or_default();
        // The fourth is idle time, and the fifth waits for disks.
        let ticks = Self { all: fields.iter().sum(), idle: at(3) + at(4) };
        (ticks, u32::try_from(lines.count()).unwrap_or(u32::MAX))
    }

    /// Returns the use since an earlier reading, in hundredths of a percent.
    fn used_since(self, earlier: Self) -> u32 {
        let all = self.all.saturating_sub(earlier.all);
        let busy = all.saturating_sub(self.idle.saturating_sub(earlier.idle));
        let used = (busy * 10_000).checked_div(all).unwrap_or_default();
        u32::try_from(used).unwrap_or(u32::MAX)
    }
}

/// Returns a value of `/proc/meminfo`, in bytes.
fn bytes_of(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or_default() << 10
}

/// Returns the load. What the kernel does not tell is 0.
pub(crate) fn load(agent: &Agent) -> LoadInfo {
    let (ticks, cpus) = CpuTicks::read(&fs::read_to_string("/proc/stat").unwrap_or_default());
    let cpu_used = ticks.used_since(agent.cpu_ticks.replace(ticks));
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = bytes_of(&meminfo, "MemTotal");
    let (disk, disk_used) = rustix::fs::statvfs("/").map_or((0, 0), |stat| {
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        (bytes(stat.f_blocks), bytes(stat.f_blocks.saturating_sub(stat.f_bfree)))
    });
    LoadInfo {
        cpus,
        cpu_used,
        memory,
        memory_used: memory.saturating_sub(bytes_of(&meminfo, "MemAvailable")),
        memory_cache: bytes_of(&meminfo, "Cached"),
        disk,
        disk_used,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_of_cpus_is_counted_between_two_readings() {
        let stat = |user: u64, idle: u64| {
            format!("cpu  {user} 0 0 {idle} 0 0 0 0 7 7\ncpu0 1 1\ncpu1 1 1\nintr 5\ncpufreq 1\n")
        };
        let (first, cpus) = CpuTicks::read(&stat(100, 300));
        let (second, _) = CpuTicks::read(&stat(150, 350));
        assert_eq!(cpus, 2);
        assert_eq!(first.used_since(CpuTicks::default()), 2_500);
        assert_eq!(second.used_since(first), 5_000);
        assert_eq!(second.used_since(second), 0);
        assert_eq!(CpuTicks::read(""), (CpuTicks::default(), 0));
    }

    #[test]
    fn memory_is_found_by_its_whole_name() {
        let info = "MemTotal:  100 kB\nSwapCached: 9 kB\nCached: 20 kB\nHugePages_Total: 3\n";
        assert_eq!(bytes_of(info, "MemTotal"), 102_400);
        assert_eq!(bytes_of(info, "Cached"), 20_480);
        assert_eq!((bytes_of(info, "MemAvailable"), bytes_of(info, "HugePages_Total")), (0, 0));
    }
}
