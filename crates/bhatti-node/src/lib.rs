//! The node half of a daemon: the sandboxes of one host.
//!
//! A [`Node`] runs sandboxes by id, each from a full specification (its row in the store). It owns
//! the state of this host alone: the driver of each sandbox, admission of memory, base snapshots
//! and spares, networks, files of volumes and snapshots, and the recovery after a restart. It
//! knows nothing of users: rights, names and quotas belong to `bhatti-control`, which the node
//! calls back through [`ControlPlane`].
//!
//! Each sandbox has one driver task, which alone changes the sandbox's state. Everything else sends
//! it requests. The driver writes the row in the store before the effect that the row announces, so
//! a daemon that dies at any point leaves a row from which the next daemon knows what to do: see
//! [`Node::recover`].

mod admission;
mod bases;
mod boot_source;
mod bring_up;
mod create;
mod disk_usage;
mod driver;
mod files;
#[cfg(test)]
mod fixture;
mod identity;
mod image_layers;
mod images;
mod metrics;
mod networks;
mod pool;
mod pull;
mod recover;
mod registry;
mod sandboxes;
mod snapshots;
mod turns;
mod volumes;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use bhatti_engine::Engine;
use bhatti_image::ImageStore;
use bhatti_store::Store;
use bhatti_types::{MemoryMib, SandboxId, SandboxName, SecretName, UserId};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::RwLock;

pub use admission::Busy;
pub use bases::BaseError;
pub use bhatti_engine::{Capabilities, MemoryKind, SnapshotInfo, Usage};
pub use bhatti_image::{
    ImageSummary, ImportError, RemoveError, SetupError, StoreError as ImageFilesError,
};
pub use bhatti_registry::{
    Blob as Layer, BlobAccess, Config as RegistryConfig, Credentials, Reference, RegistryError,
};
pub use boot_source::{CreateError, Prepared};
pub use create::Shape;
pub use driver::SavedSandbox;
pub use driver::{DestroyError, TransitionError};
pub use identity::{Extras, GuestFile, random, random_token};
pub use image_layers::{ImageArchive, KeptLayers};
pub use images::{CollectError, Held, Leftovers, UsedImages};
pub use networks::{NetworkConfig, NetworkError};
pub use pull::{ImageAccess, PullError, PullProgress, Pulled};
pub use recover::{RecoverError, Recovery};
pub use sandboxes::{SandboxUse, UseError};
pub use snapshots::{ForkSource, SnapshotFiles};
pub use turns::Turns;
pub use volumes::{MadeFrom, VolumeFileError, VolumeFiles, VolumeUseError, volumes_of_fork};

use admission::{Admission, Admitted};
use bases::Bases;
use driver::Request;
use metrics::Metrics;
use pool::Spares;
use pull::ImagePuller;
use registry::Registry;

/// The services of its daemon's control half that a node uses. Calls block on the store for a
/// moment.
pub trait ControlPlane: Send + Sync {
    /// Records an event of a sandbox.
    fn record(&self, kind: &'static str, owner: UserId, sandbox: SandboxId, detail: Value);

    /// Returns the values of the owner's secrets with these names, for a boot. Secrets that are
    /// deleted or unreadable are left out.
    fn secrets(&self, owner: UserId, names: &[SecretName]) -> BTreeMap<String, String>;
}

/// The settings of a node.
pub struct Config {
    /// The directory of the sandboxes' directories.
    pub sandboxes_dir: PathBuf,
    /// The artifacts that VMs boot from.
    pub images: ImageStore,
    /// The settings of registries.
    pub registries: bhatti_registry::Config,
    /// The guest agent's program.
    pub lohar: PathBuf,
    /// The time limit of a boot.
    pub boot_limit: Duration,
    /// The directory of named snapshots.
    pub snapshots_dir: PathBuf,
    /// The directory of base snapshots.
    pub bases_dir: PathBuf,
    /// The disk space that base snapshots may take, in bytes.
    pub bases_bytes: u64,
    /// The host name of the guests from which base snapshots are made.
    pub base_hostname: SandboxName,
    /// The number of VMMs that are kept waiting for a state.
    pub ready_vmms: usize,
    /// The number of VMs that are kept paused with their state loaded.
    pub ready_forks: usize,
    /// The memory of all VMs together, in MiB.
    pub memory_budget_mib: usize,
    /// When unused sandboxes cool.
    pub thermal: ThermalConfig,
    /// The directory of volumes.
    pub volumes_dir: PathBuf,
    /// The networks of sandboxes.
    pub network: NetworkConfig,
}

/// When an unused sandbox cools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThermalConfig {
    /// From hot to warm.
    pub warm_after: Duration,
    /// From warm to cold.
    pub cold_after: Duration,
}

/// The node half of a daemon. Clones share it.
#[derive(Clone)]
pub struct Node {
    shared: Arc<Shared>,
}

/// The state that the parts of a node share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) store: Arc<Store>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) control: Arc<dyn ControlPlane>,
    pub(crate) registry: Registry,
    pub(crate) admission: Admission,
    pub(crate) bases: Bases,
    pub(crate) spares: Spares,
    pub(crate) snapshots: SnapshotFiles,
    pub(crate) volumes: VolumeFiles,
    pub(crate) metrics: Metrics,
    /// The number of an earlier daemon's sandboxes that are not adopted yet.
    pub(crate) taking_up: AtomicUsize,
    /// See [`images`].
    pub(crate) images_hold: Arc<RwLock<()>>,
    /// Held while unused files of images are removed.
    pub(crate) collecting_images: Mutex<()>,
    /// Made by the first pull.
    pub(crate) puller: Mutex<Option<ImagePuller>>,
}

impl Shared {
    /// Reserves memory for a VM. If none is free, spares and then warm sandboxes give theirs.
    pub(crate) async fn admit(&self, memory: MemoryMib) -> Result<Admitted, Busy> {
        if let Some(admitted) = self.admission.admit_now(memory) {
            return Ok(admitted);
        }
        self.admission.check(memory)?;
        let _waiting = self.spares.hold_back();
        self.spares.clear(self).await;
        // The least recently used sandbox gives its memory first. The next one is asked only if
        // that is too little.
        let mut asked = HashSet::new();
        let make_room = || {
            let next = self.registry.longest_idle(&asked);
            asked.extend(next.iter().map(|(id, _)| *id));
            async move {
                let Some((_, handle)) = next else { return false };
                // A sandbox that cannot give its memory has logged why.
                drop(handle.ask(Request::GiveMemory).await);
                true
            }
        };
        self.admission.admit(memory, make_room).await
    }

    /// Returns the directory of a sandbox.
    pub(crate) fn directory(&self, id: SandboxId) -> PathBuf {
        self.config.sandboxes_dir.join(id.to_string())
    }
}

impl Node {
    /// Makes a node that knows no sandbox yet: see [`recover`](Self::recover).
    #[must_use]
    pub fn new(
        config: Config,
        store: Arc<Store>,
        engine: Arc<dyn Engine>,
        control: Arc<dyn ControlPlane>,
    ) -> Self {
        let admission = Admission::new(config.memory_budget_mib, engine.capabilities().vmm_mib);
        let bases = Bases::new(config.bases_dir.clone(), config.bases_bytes);
        let snapshots = SnapshotFiles::new(config.snapshots_dir.clone());
        let volumes = VolumeFiles::new(config.volumes_dir.clone());
        Self {
            shared: Arc::new(Shared {
                config,
                store,
                engine,
                control,
                registry: Registry::default(),
                admission,
                bases,
                spares: Spares::default(),
                snapshots,
                volumes,
                metrics: Metrics::new(),
                taking_up: AtomicUsize::new(0),
                images_hold: Arc::default(),
                collecting_images: Mutex::default(),
                puller: Mutex::default(),
            }),
        }
    }

    /// Returns the engine's capabilities.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.shared.engine.capabilities()
    }

    /// Returns the files of volumes.
    #[must_use]
    pub fn volume_files(&self) -> &VolumeFiles {
        &self.shared.volumes
    }
}
