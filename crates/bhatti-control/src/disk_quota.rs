//! The quota of host disk space that a user's sandboxes, snapshots and images take.
//!
//! The node measures the used space. Operations that add files check the quota. A guest's writes
//! to its own disk are bounded by the size of that disk, so a user can exceed the quota by the
//! sizes of its sandboxes' disks at most.

use std::collections::HashMap;
use std::sync::Arc;

use bhatti_store::{SandboxRow, StoreError};
use bhatti_types::{QuotaExceeded, UserId};
use parking_lot::Mutex;

use crate::Control;

const MIB: u64 = 1 << 20;

/// Bytes that operations in progress may still add, by user.
pub(crate) type Reservations = Arc<Mutex<HashMap<UserId, u64>>>;

/// Bytes that are reserved for one operation until this is dropped.
#[derive(Debug)]
pub struct DiskReservation {
    reservations: Reservations,
    owner: UserId,
    bytes: u64,
}

impl Drop for DiskReservation {
    fn drop(&mut self) {
        let mut reservations = self.reservations.lock();
        if let Some(bytes) = reservations.get_mut(&self.owner) {
            *bytes -= self.bytes;
            if *bytes == 0 {
                reservations.remove(&self.owner);
            }
        }
    }
}

/// An operation may not take more disk space.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskQuotaError {
    /// The user would exceed its quota.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Control {
    /// Admits an operation that saves a sandbox: it may add the sandbox's memory and copies of its
    /// volumes. If the quota has no room for them, the layers of the sandbox's disk are merged
    /// first.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner's quota does not allow it. Nothing but the layers has changed.
    pub(crate) async fn admit_save(
        &self,
        row: &SandboxRow,
    ) -> Result<Option<DiskReservation>, DiskQuotaError> {
        let volumes: u64 = row.volumes.iter().map(|volume| volume.size.bytes()).sum();
        let needed = u64::from(row.spec.memory.get()) * MIB + volumes;
        let refused = match self.admit_disk(row.owner, needed).await {
            Err(DiskQuotaError::Quota(refused)) => refused,
            other => return other,
        };
        match self.inner.node.merge_disk(row.id).await {
            Ok(true) => self.admit_disk(row.owner, needed).await,
            _ => Err(refused.into()),
        }
    }

    /// Admits an operation that may add `needed` bytes.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner's quota does not allow it.
    pub(crate) async fn admit_disk(
        &self,
        owner: UserId,
        needed: u64,
    ) -> Result<Option<DiskReservation>, DiskQuotaError> {
        let Some(max) = self.inner.store.quota(owner)?.disk_mib else { return Ok(None) };
        let mut used = self.disk_used(owner).await?;
        // The cached steps of templates go before anything is refused.
        if used.saturating_add(needed) > u64::from(max) * MIB && self.forget_steps(owner, 0).await?
        {
            used = self.disk_used(owner).await?;
        }
        let reservations = &self.inner.disk_reservations;
        let mut all = reservations.lock();
        let reserved = all.entry(owner).or_default();
        let used = used.saturating_add(*reserved);
        if used.saturating_add(needed) > u64::from(max) * MIB {
            let (used, needed) = (used.div_ceil(MIB), needed.div_ceil(MIB));
            return Err(QuotaExceeded::Disk { used, needed, max }.into());
        }
        *reserved += needed;
        let reservations = Arc::clone(reservations);
        Ok(Some(DiskReservation { reservations, owner, bytes: needed }))
    }

    /// Returns the bytes that a user's quota leaves; `None` if it has no limit.
    ///
    /// # Errors
    ///
    /// Returns an error if nothing is left.
    pub(crate) async fn disk_left(&self, owner: UserId) -> Result<Option<u64>, DiskQuotaError> {
        let Some(max) = self.inner.store.quota(owner)?.disk_mib else { return Ok(None) };
        let _one = self.admit_disk(owner, 1).await?;
        let used = self.disk_used(owner).await?;
        Ok(Some((u64::from(max) * MIB).saturating_sub(used)))
    }

    /// Returns the bytes of a user's sandboxes, snapshots and images.
    async fn disk_used(&self, owner: UserId) -> Result<u64, StoreError> {
        let store = &self.inner.store;
        let sandboxes = store.list_sandbox_ids(owner)?;
        let snapshots: Vec<_> =
            store.list_snapshots(Some(owner))?.iter().map(|snapshot| snapshot.id).collect();
        let used = self.inner.node.disk_used(&sandboxes, &snapshots).await;
        Ok(used.saturating_add(store.image_bytes(owner)?))
    }
}
