//! The CPU of this machine, as guests under KVM see it.

/// Identifies the CPU by vendor, model and features. A saved guest can only move between CPUs
/// with the same identity. The kernel's version is not part of it, so that a saved guest can be
/// restored after a kernel update.
#[must_use]
pub fn identity() -> String {
    imp::identity()
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::arch::x86_64::{__cpuid_count, CpuidResult};
    use std::fmt::Write;

    /// Leaf 1 and its features, structured features, extended features, and the state that XSAVE
    /// saves. In leaf 1, EBX holds the number of the core that runs the instruction, so it may
    /// differ between two calls.
    const LEAVES: [(u32, u32); 6] = [(1, 0), (7, 0), (7, 1), (0x8000_0001, 0), (0xd, 0), (0xd, 1)];

    pub(super) fn identity() -> String {
        let vendor = __cpuid_count(0, 0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
        let mut identity = String::from_utf8_lossy(&name).into_owned();
        for (leaf, part) in LEAVES {
            let CpuidResult { eax, ebx, ecx, edx } = __cpuid_count(leaf, part);
            // EBX of leaf 0xd is the size of the currently enabled state.
            let ebx = if leaf == 7 { ebx } else { 0 };
            let written = write!(identity, " {eax:x}.{ebx:x}.{ecx:x}.{edx:x}");
            debug_assert!(written.is_ok(), "writing to a string never fails");
        }
        identity
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    pub(super) fn identity() -> String {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let first = cpuinfo.split("\n\n").next().unwrap_or_default();
        let wanted = ["CPU implementer", "CPU variant", "CPU part", "CPU revision", "Features"];
        let lines = first.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
        let values = lines.filter_map(|line| line.split_once(':')).map(|(_, value)| value.trim());
        values.collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_core_has_the_same_identity() {
        let here = identity();
        let asked: Vec<String> =
            (0..16).map(|_| std::thread::spawn(identity).join().unwrap_or_default()).collect();

        assert!(here.len() > 20, "{here}");
        assert!(asked.iter().all(|identity| *identity == here), "{asked:?}");
    }
}
