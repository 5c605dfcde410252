//! Checks whether KVM works on this host.

use std::fs;
use std::fs::OpenOptions;
use std::io;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmUnusable {
    /// `/dev/kvm` does not exist, or this process may not open it.
    #[error("/dev/kvm cannot be opened")]
    Device(#[source] io::Error),
    /// The CPU offers no hardware virtualization to this machine. On such nested hosts `/dev/kvm`
    /// may open, but no stock kernel boots under KVM.
    #[error("this CPU has neither `vmx` nor `svm`, so KVM cannot run a stock kernel")]
    NoExtension,
}

/// Checks that KVM can run a stock kernel.
///
/// # Errors
///
/// Returns why it cannot.
pub fn check() -> Result<(), KvmUnusable> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(KvmUnusable::Device)?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(KvmUnusable::Device)?;
    if has_extension(&cpuinfo) { Ok(()) } else { Err(KvmUnusable::NoExtension) }
}

/// Whether the CPU has hardware virtualization. Arm CPUs show no flag for it: there, KVM works if
/// the device opens.
fn has_extension(cpuinfo: &str) -> bool {
    let mut flags =
        cpuinfo.lines().filter(|line| line.starts_with("flags")).flat_map(str::split_whitespace);
    cfg!(not(target_arch = "x86_64")) || flags.any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn processor_virtualizes_only_with_the_flag() {
        assert!(has_extension("processor: 0\nflags\t\t: fpu svm sse\n"));
        assert!(has_extension("flags\t\t: vmx\n"));
        assert!(!has_extension("model name : vmx svm\nflags\t\t: fpu svmx\n"));
    }
}
