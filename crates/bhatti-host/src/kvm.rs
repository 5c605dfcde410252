//! Whether KVM really works here.

use std::fs;
use std::fs::OpenOptions;
use std::io;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmUnusable {
    /// There is no `/dev/kvm`, or it may not be opened.
    #[error("/dev/kvm cannot be opened")]
    Device(#[source] io::Error),
    /// The processor offers no hardware virtualization to this machine: `/dev/kvm` may open on such nested hosts, and no stock kernel
    /// boots in it.
    #[error("the processor shows neither `vmx` nor `svm`, so no stock kernel boots under KVM here")]
    NoExtension,
}

/// Checks that KVM can run a stock kernel.
///
/// # Errors
///
/// Says why it cannot.
pub fn check() -> Result<(), KvmUnusable> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(KvmUnusable::Device)?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(KvmUnusable::Device)?;
    if has_extension(&cpuinfo) { Ok(()) } else { Err(KvmUnusable::NoExtension) }
}

/// Whether the processor virtualizes. Arm's shows no flag for it: there, a device that opens is KVM that works.
fn has_extension(cpuinfo: &str) -> bool {
    let mut flags =
        cpuinfo.lines().filter(|line| line.starts_with("flags")).flat_map(str::split_whitespace);
    cfg!(not(target_arch = "x86_64")) || flags.any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn only_a_processor_with_the_flag_virtualizes() {
        assert!(has_extension("processor: 0\nflags\t\t: fpu svm sse\n"));
        assert!(has_extension("flags\t\t: vmx\n"));
        assert!(!has_extension("model name : vmx svm\nflags\t\t: fpu svmx\n"));
    }
}
