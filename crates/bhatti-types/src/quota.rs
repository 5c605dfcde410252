//! Quotas of a user.

use crate::DiskMib;

/// Limits of one user. `None` means no limit.
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
    /// All volumes together, in MiB.
    pub volumes_mib: Option<u32>,
    /// Disk space of the host that the user's sandboxes, snapshots and images take together, in
    /// MiB.
    pub disk_mib: Option<u32>,
}

impl Quota {
    /// The default quota of a user.
    pub const USUAL: Self = Self {
        sandboxes: Some(5),
        cpus_per_sandbox: Some(4),
        memory_mib_per_sandbox: Some(4096),
        snapshots: Some(5),
        volumes_mib: Some(20_480),
        disk_mib: Some(51_200),
    };
}

/// A request would exceed a user's quota.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuotaExceeded {
    /// The user has as many sandboxes as allowed.
    #[error("sandbox limit reached ({used}/{max})")]
    Sandboxes {
        /// Number of sandboxes that the user has.
        used: u32,
        /// Number that is allowed.
        max: u32,
    },
    /// The user has as many snapshots as allowed.
    #[error("snapshot limit reached ({used}/{max})")]
    Snapshots {
        /// Number of snapshots that the user has.
        used: u32,
        /// Number that is allowed.
        max: u32,
    },
    /// The user has as many objects of one kind as any user may.
    #[error("{what} limit reached ({used}/{max})")]
    Count {
        /// The kind of object.
        what: &'static str,
        /// Number that the user has.
        used: u32,
        /// Number that is allowed.
        max: u32,
    },
    /// The user's volumes would exceed their total size.
    #[error(
        "volume limit reached: volumes take {used} MiB, this needs {asked} MiB more, and {max} MiB are allowed"
    )]
    Volumes {
        /// Total size of the user's volumes, in MiB.
        used: u64,
        /// Additional size of the request, in MiB.
        asked: u64,
        /// Total size that is allowed, in MiB.
        max: u32,
    },
    /// The user's sandboxes, snapshots and images would take too much of the host's disk.
    #[error(
        "disk limit reached: sandboxes, snapshots and images take {used} MiB, this needs up to {needed} MiB more, and {max} MiB are allowed"
    )]
    Disk {
        /// Disk space that they take, in MiB.
        used: u64,
        /// Maximum that the operation may add, in MiB.
        needed: u64,
        /// Disk space that is allowed, in MiB.
        max: u32,
    },
    /// The request gives a sandbox too many vCPUs.
    #[error("max {max} CPUs per sandbox")]
    Cpus {
        /// Number that is allowed.
        max: u32,
    },
    /// The request gives a sandbox too much memory.
    #[error("max {max} MB memory per sandbox")]
    Memory {
        /// Memory that is allowed, in MiB.
        max: u32,
    },
    /// The request gives a sandbox a disk that is larger than the disk space of all sandboxes may
    /// be.
    #[error(
        "a disk of {disk} is more than the {max} MiB that sandboxes, snapshots and images may take"
    )]
    DiskSize {
        /// The requested disk.
        disk: DiskMib,
        /// Disk space that is allowed, in MiB.
        max: u32,
    },
}

impl QuotaExceeded {
    /// Whether the user can make the request pass by removing something; otherwise the user has
    /// to ask for less.
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
