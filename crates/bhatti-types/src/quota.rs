//! What a user may have.

use crate::DiskMib;

/// What one user may have at most; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Sandboxes.
    pub sandboxes: Option<u32>,
    /// vCPUs of one sandbox.
    pub cpus_per_sandbox: Option<u32>,
    /// Memory of one sandbox, in MiB.
    pub memory_mib_per_sandbox: Option<u32>,
    /// Named snapshots.
    pub snapshots: Option<u32>,
    /// Volumes, all together, in MiB.
    pub volumes_mib: Option<u32>,
    /// Disk space of the host that its sandboxes and snapshots take together, in MiB.
    pub disk_mib: Option<u32>,
}

impl Quota {
    /// That of a user for whom nothing else was said.
    pub const USUAL: Self = Self {
        sandboxes: Some(5),
        cpus_per_sandbox: Some(4),
        memory_mib_per_sandbox: Some(4096),
        snapshots: Some(5),
        volumes_mib: Some(20_480),
        disk_mib: Some(51_200),
    };
}

/// A user would have more than it may.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuotaExceeded {
    /// It has as many sandboxes as it may.
    #[error("sandbox limit reached ({used}/{max})")]
    Sandboxes {
        /// How many it has.
        used: u32,
        /// How many it may have.
        max: u32,
    },
    /// It has as many snapshots as it may.
    #[error("snapshot limit reached ({used}/{max})")]
    Snapshots {
        /// How many it has.
        used: u32,
        /// How many it may have.
        max: u32,
    },
    /// It has as many of something as anybody may.
    #[error("{what} limit reached ({used}/{max})")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many it has.
        used: u32,
        /// How many it may have.
        max: u32,
    },
    /// Its volumes would be too large together.
    #[error(
        "volume limit reached: {used} MiB are in use, {asked} more are asked for, {max} may be"
    )]
    Volumes {
        /// How much it has, in MiB.
        used: u64,
        /// How much more was asked for, in MiB.
        asked: u64,
        /// How much it may have, in MiB.
        max: u32,
    },
    /// Its sandboxes and snapshots would take too much of the host's disk.
    #[error(
        "disk limit reached: sandboxes and snapshots take {used} MiB, this needs up to {needed} MiB more, and {max} MiB are allowed"
    )]
    Disk {
        /// How much they take, in MiB.
        used: u64,
        /// How much the operation may add, in MiB.
        needed: u64,
        /// How much they may take, in MiB.
        max: u32,
    },
    /// The sandbox is to have too many vCPUs.
    #[error("max {max} CPUs per sandbox")]
    Cpus {
        /// How many it may have.
        max: u32,
    },
    /// The sandbox is to have too much memory.
    #[error("max {max} MB memory per sandbox")]
    Memory {
        /// How much it may have, in MiB.
        max: u32,
    },
    /// The sandbox is to have a disk that is larger than all disks may be together.
    #[error("a disk of {disk} is more than the {max} MiB that sandboxes and snapshots may take")]
    DiskSize {
        /// The disk that was asked for.
        disk: DiskMib,
        /// How much they may take, in MiB.
        max: u32,
    },
}

impl QuotaExceeded {
    /// Whether giving something up helps; asking for less does otherwise.
    #[must_use]
    pub const fn passes(&self) -> bool {
        matches!(
            self,
            Self::Sandboxes { .. }
                | Self::Snapshots { .. }
                | Self::Count { .. }
                | Self::Volumes { .. }
                | Self::Disk { .. }
        )
    }
}
