//! The load of a sandbox, as both parts of the API describe it.

use bhatti_proto::LoadInfo;
use bhatti_store::SandboxRow;

/// What a sandbox uses.
pub(crate) struct Load {
    pub(crate) info: LoadInfo,
    pub(crate) cpus: u32,
    /// The use of all its CPUs, in percent.
    pub(crate) cpu_used_pct: f64,
}

impl Load {
    /// `info` is what the agent said, if it did. Where sandboxes share the host's kernel, that
    /// counts the host's CPUs and memory, so the sandbox's own limits bound them.
    pub(crate) fn of(info: Option<LoadInfo>, row: &SandboxRow) -> Option<Self> {
        let mut info = info?;
        info.memory = info.memory.min(row.spec.memory.bytes());
        info.memory_used = info.memory_used.min(info.memory);
        let cpu_used_pct = f64::from(info.cpu_used) / 100.0;
        Some(Self { info, cpus: row.spec.cpus.get().into(), cpu_used_pct })
    }
}
