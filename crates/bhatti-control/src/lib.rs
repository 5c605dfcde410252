//! The control half of a daemon: users' rights, names, quotas, secrets and catalogs.
//!
//! Control checks users' rights, and writes the wanted state to the store. It never touches a
//! path, a tap, a process or an engine. [`Node`] runs the sandboxes of this host and knows nothing
//! about users' rights.
//!
//! ```text
//!  bhatti-server ──► Control ──► Store   rows: sandboxes, snapshots, volumes, secrets, events
//!                       │
//!                       └──────► Node    by id, with the full specification
//!                                 └────► NodeServices   events, and secrets for a boot
//! ```

mod build;
mod build_errors;
mod catalog;
mod create;
mod disk_quota;
mod events;
mod fork;
mod image_errors;
mod image_work;
mod images;
mod logins;
mod networks;
mod operation_errors;
mod operation_log;
mod operations;
mod sandboxes;
mod secrets;
mod services;
mod snapshots;
mod template_build;
mod users;
mod volumes;

use std::sync::Arc;

use bhatti_node::{Capabilities, ControlPlane, Node, Recovery, Turns};
use bhatti_secret::SecretKey;
use bhatti_store::{Store, StoreError};
use bhatti_types::{Allowance, NetworkMode, SandboxId, UserId};
use prometheus_client::registry::Registry;
use serde_json::Value;

pub use build::{BuildRequest, DOCKERFILE_BYTES_MAX};
pub use build_errors::{BuildError, TemplateBuildError};
pub use create::{CreateError, FileRequest, SandboxRequest, unix_seconds_after};
pub use disk_quota::DiskReservation;
pub use fork::{FORKS_MAX, ForkError, ForkRequest, Forked};
pub use image_errors::{DockerfileError, ImageCommandError, ImageError, PullFailure, SaveError};
pub use images::{PullPolicy, UsableImage};
pub use logins::{Login, LoginError};
pub use networks::NetworkError;
pub use operation_errors::OperationFailure;
pub use operation_log::LogPart;
pub use operations::{LayerProgress, Made, Operation, OperationKind, OperationState};
pub use sandboxes::EditError;
pub use secrets::{SecretError, seal_context};
pub use snapshots::{ResumeRequest, SnapshotOpError};
pub use template_build::{FilesBelow, Step, TemplateBuild};
pub use volumes::{VolumeInfo, VolumeOpError};

use disk_quota::Reservations;
use events::Events;
use operations::Operations;
use secrets::Secrets;
use services::NodeServices;

/// The settings of the control half.
pub struct Config {
    /// The key that seals secrets in the store.
    pub secret_key: SecretKey,
    /// Address ranges that users other than the admin may allow their sandboxes to reach.
    pub network_allowable: Allowance,
    /// The disk space that pulled images may take, in bytes; no limit if absent.
    pub pulled_images_bytes: Option<u64>,
}

/// The control half of a daemon. Clones share it.
#[derive(Clone)]
pub struct Control {
    inner: Arc<Inner>,
}

struct Inner {
    node: Node,
    store: Arc<Store>,
    secrets: Arc<Secrets>,
    events: Arc<Events>,
    network_allowable: Allowance,
    pulled_images_bytes: Option<u64>,
    disk_reservations: Reservations,
    operations: Operations,
    /// One build of a user at a time: they share a cache.
    builds: Turns<UserId>,
}

impl Control {
    /// Makes the control half, and with `start_node` the node that it directs. The node's sandboxes
    /// are unknown until [`recover`](Self::recover) has run.
    #[must_use]
    pub fn new(
        config: Config,
        store: Arc<Store>,
        start_node: impl FnOnce(Arc<dyn ControlPlane>) -> Node,
    ) -> Self {
        let Config { secret_key, network_allowable, pulled_images_bytes } = config;
        let events = Arc::new(Events::new(Arc::clone(&store)));
        let secrets = Arc::new(Secrets::new(secret_key, Arc::clone(&store)));
        let services =
            NodeServices::new(Arc::clone(&store), Arc::clone(&events), Arc::clone(&secrets));
        let node = start_node(Arc::new(services));
        let disk_reservations = Reservations::default();
        Self {
            inner: Arc::new(Inner {
                node,
                store,
                secrets,
                events,
                network_allowable,
                pulled_images_bytes,
                disk_reservations,
                operations: Operations::default(),
                builds: Turns::default(),
            }),
        }
    }

    /// Settles the files and rows that an earlier daemon left, and begins to adopt its sandboxes.
    /// If the daemon is killed at any point of this, the next daemon repeats it.
    ///
    /// # Errors
    ///
    /// Returns an error if the store or a directory cannot be read. A sandbox that cannot be
    /// adopted is logged and left alone.
    pub async fn recover(&self) -> Result<Recovery, bhatti_node::RecoverError> {
        self.settle_volumes().await?;
        let recovery = self.inner.node.recover().await?;
        self.settle_builds().await?;
        self.forget_unused(None).await?;
        Ok(recovery)
    }

    /// Returns the number of an earlier daemon's sandboxes that are not adopted or removed yet.
    #[must_use]
    pub fn taking_up(&self) -> usize {
        self.inner.node.taking_up()
    }

    /// Returns the engine's capabilities.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.inner.node.capabilities()
    }

    /// Returns the network mode of sandboxes that ask for none, or why they have no network.
    ///
    /// # Errors
    ///
    /// Returns why this host's network cannot be used.
    pub fn network(&self) -> Result<NetworkMode, &str> {
        self.inner.node.network()
    }

    /// Watches the firewall rules of the sandboxes' networks for as long as the future is polled.
    pub async fn watch_networks(self) {
        self.inner.node.watch_networks().await;
    }

    /// Makes the base snapshot of the default image and shape if there is none, and starts spares.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    pub async fn warm_up(&self) -> Result<(), bhatti_node::CreateError> {
        self.inner.node.warm_up().await
    }

    /// Starts spares if there is a base snapshot to start them from.
    pub async fn start_spares(&self) {
        self.inner.node.start_spares().await;
    }

    /// Ends spares and waits for work on volumes. Sandboxes run on, unless `save_sandboxes` is set:
    /// then each sandbox is saved, ten at a time.
    pub async fn shut_down(&self, save_sandboxes: bool) {
        self.inner.node.shut_down(save_sandboxes).await;
    }

    /// Adds the metrics of the node to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.inner.node.register_metrics(registry);
    }

    /// Records an event.
    pub fn record(
        &self,
        kind: &'static str,
        owner: UserId,
        sandbox: Option<(SandboxId, String)>,
        detail: Value,
    ) {
        self.inner.events.record(kind, owner, sandbox, detail);
    }

    /// Returns how many sandboxes all users have.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn count(&self) -> Result<u64, StoreError> {
        self.inner.store.count_sandboxes()
    }
}

#[cfg(test)]
mod tests;
