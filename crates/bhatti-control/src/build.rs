//! Builds of images from Dockerfiles.
//!
//! A build runs in a sandbox of its own, with Buildah and the owner's cache of layers. The daemon
//! pulls the images that the Dockerfile names, so logins at registries never enter the sandbox.
//!
//! ```text
//!  daemon                                  sandbox of the image `builder`
//!    reads the Dockerfile, pulls bases
//!    mounts the volume `build-cache`  ──►  /build: Buildah's storage
//!    sends bases and the context      ──►  /build/tmp, /build/context
//!                                          buildah build: one layer for each step
//!    imports the result               ◄──  docker-archive
//!    destroys the sandbox
//! ```

mod cache;
mod dockerfile;
mod expand;
mod progress;
mod session;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use bhatti_node::UseError;
use bhatti_store::{Attach, AttachKind, ImageRow, Replace, SandboxRow, SnapshotRow};
use bhatti_types::{
    BUILDER_IMAGE, CpuCount, ImageName, Labels, MemoryMib, NetworkMode, Report, SandboxId,
    SandboxName, UserId,
};
use serde_json::json;
use tokio::runtime::Handle;
use tokio::sync::OwnedMutexGuard;
use tracing::{info, warn};

use crate::Control;
use crate::build_errors::BuildError;
use crate::create::{CreateError, SandboxRequest};
use crate::image_errors::{DockerfileError, ImageError};
use crate::image_work::Keeping;
use crate::images::{PullPolicy, UsableImage};
use crate::operations::{Operation, OperationKind};

use dockerfile::Dockerfile;
use session::Session;

/// Maximum length of a Dockerfile, in bytes.
pub const DOCKERFILE_BYTES_MAX: usize = 1 << 20;

/// Memory of a build's sandbox, in MiB, unless the request says otherwise.
const MEMORY_MIB: u64 = 2048;

/// vCPUs of a build's sandbox, unless the request says otherwise.
const CPUS: u64 = 2;

/// Maximum length of the value of an argument or a secret, in bytes.
const VALUE_BYTES_MAX: usize = 64 << 10;

/// Maximum number of a build's arguments, and of its secrets.
const INPUTS_MAX: usize = 128;

/// Time after which a build's sandbox is destroyed in any case.
pub(crate) const LIFETIME: Duration = Duration::from_hours(6);

/// A request to build an image.
#[derive(Clone)]
pub struct BuildRequest {
    /// The name of the image. An image of the owner with that name is replaced.
    pub name: ImageName,
    /// The Dockerfile.
    pub dockerfile: String,
    /// The values of the Dockerfile's arguments.
    pub arguments: BTreeMap<String, String>,
    /// Secrets that steps can mount, by id. They are in no layer.
    pub secrets: BTreeMap<String, String>,
    /// The stage to build; the last one if absent.
    pub target: Option<String>,
    /// When the images that the Dockerfile names are pulled.
    pub pull: PullPolicy,
    /// Whether all steps run, also those whose layers are in the cache.
    pub no_cache: bool,
    /// The vCPUs of the sandbox; two if absent.
    pub cpus: Option<CpuCount>,
    /// The memory of the sandbox; 2048 MiB if absent.
    pub memory: Option<MemoryMib>,
    /// The network mode of the sandbox; the host's default if absent.
    pub network: Option<NetworkMode>,
}

/// An image that a build begins with or copies from.
struct Base {
    /// What the Dockerfile calls it, as it is written and with the values of arguments.
    names: [String; 2],
    image: ImageRow,
}

/// Returns a name for the sandbox of a build.
pub(crate) fn build_name() -> Result<SandboxName, CreateError> {
    let digits = u32::from_be_bytes(bhatti_node::random()?);
    Ok(format!("build-{digits:08x}").parse()?)
}

/// Destroys the sandbox of a build, however the build ends.
pub(crate) struct BuildSandbox {
    control: Control,
    owner: UserId,
    id: SandboxId,
    /// The next build of the owner waits until the cache is free. A build of an earlier daemon has
    /// no turn.
    turn: Option<Turn>,
    is_destroyed: bool,
}

/// The turn of an owner's build.
pub(crate) type Turn = Arc<OwnedMutexGuard<()>>;

/// What the sandbox of a build is created from.
pub(crate) enum CreateFrom {
    /// The image of the request, or its snapshot.
    Image(SandboxRequest),
    /// This snapshot.
    Snapshot(Box<SnapshotRow>, SandboxRequest),
}

impl BuildSandbox {
    /// Creates a sandbox for a build whose turn this is.
    ///
    /// # Cancel safety
    ///
    /// A creation that has begun continues, and its sandbox is then destroyed.
    pub(crate) async fn create(
        control: &Control,
        owner: UserId,
        turn: Turn,
        from: CreateFrom,
    ) -> Result<(Self, SandboxRow), CreateError> {
        let control = control.clone();
        let created = tokio::spawn(async move {
            let row = match from {
                CreateFrom::Image(request) => control.create(owner, request).await,
                CreateFrom::Snapshot(snapshot, request) => {
                    control.create_from_snapshot(owner, *snapshot, request).await
                }
            }?;
            let (id, turn) = (row.id, Some(turn));
            Ok((Self { control, owner, id, turn, is_destroyed: false }, row))
        });
        created.await.map_err(|_| CreateError::Interrupted)?
    }

    /// Destroys the sandbox now.
    pub(crate) async fn destroy(mut self) {
        destroy(self.control.clone(), self.owner, self.id).await;
        self.is_destroyed = true;
    }
}

impl Drop for BuildSandbox {
    fn drop(&mut self) {
        if self.is_destroyed {
            return;
        }
        let destroyed = destroy(self.control.clone(), self.owner, self.id);
        let turn = self.turn.take();
        // Without a runtime, the daemon is ending. The next one destroys the sandbox.
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move {
            destroyed.await;
            drop(turn);
        });
    }
}

async fn destroy(control: Control, owner: UserId, sandbox: SandboxId) {
    match control.destroy(owner, &sandbox.to_string()).await {
        Ok(()) | Err(UseError::NotFound(_)) => {}
        Err(error) => {
            warn!(%sandbox, error = %Report(&error), "Failed to destroy the sandbox of a build");
        }
    }
}

impl Control {
    /// Begins to build an image from a Dockerfile and an archive of its context: a tar archive,
    /// which may be compressed with gzip or xz. Builds of one owner run one after the other.
    ///
    /// # Errors
    ///
    /// Returns an error if the Dockerfile or the name is not valid, if this host cannot build, or
    /// if the owner has too many running operations.
    pub async fn build_image(
        &self,
        owner: UserId,
        request: BuildRequest,
        context: File,
    ) -> Result<Operation, ImageError> {
        let dockerfile = self.admit_build(owner, &request).await?;
        let bytes = context.metadata()?.len();
        let reserved = self.admit_disk(owner, bytes).await?;
        let id = bhatti_node::random()?;
        let name = request.name.to_string();
        let control = self.clone();
        let work = |operation: Operation| async move {
            let _reserved = reserved;
            control.build(owner, request, dockerfile, context, &operation).await
        };
        Ok(self.inner.operations.begin(owner, id, (OperationKind::Build, &name), work)?)
    }

    /// Refuses a build that would fail when its context has been received.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`build_image`](Self::build_image).
    pub async fn check_build(
        &self,
        owner: UserId,
        request: &BuildRequest,
    ) -> Result<(), ImageError> {
        self.admit_build(owner, request).await.map(drop)
    }

    async fn admit_build(
        &self,
        owner: UserId,
        request: &BuildRequest,
    ) -> Result<Dockerfile, ImageError> {
        check_inputs(request)?;
        let target = request.target.as_deref();
        let dockerfile = Dockerfile::read(&request.dockerfile, &request.arguments, target)?;
        let node = &self.inner.node;
        if node.host_root(request.name.as_str())?.is_some() {
            return Err(ImageError::NameTaken(request.name.clone()));
        }
        if node.host_root(BUILDER_IMAGE)?.is_none() {
            return Err(ImageError::NoBuilder);
        }
        self.disk_left(owner).await?;
        Ok(dockerfile)
    }

    async fn build(
        &self,
        owner: UserId,
        request: BuildRequest,
        dockerfile: Dockerfile,
        context: File,
        operation: &Operation,
    ) -> Result<ImageRow, BuildError> {
        // The cache is attached to one sandbox at a time.
        let turn = Arc::new(self.inner.builds.take(owner).await);
        let bases = self.bases(owner, &dockerfile, request.pull, operation).await?;
        let left = self.disk_left(owner).await.map_err(ImageError::from)?;
        let new = CreateFrom::Image(self.build_sandbox(owner, &request).await?);
        // The turn lasts until the image is kept: a later build of that name replaces it.
        let created = BuildSandbox::create(self, owner, Arc::clone(&turn), new).await;
        let (sandbox, _) = created?;
        let session = Session { sandbox: &sandbox, operation };
        let built = session.run(&request, &dockerfile, context, &bases).await;
        sandbox.destroy().await;
        let archive = built?;
        operation.write(b"importing the image\n");
        let keeping = Keeping {
            left,
            settings: None,
            source: "built from a Dockerfile".to_owned(),
            replace: Replace::Yes,
        };
        let made = self.keep_archive(owner, request.name, archive, keeping).await;
        let made = made?;
        info!(image = %made.name, bytes = made.disk_bytes, "Built an image");
        self.record("image.built", owner, None, json!({ "image": made.name.as_str() }));
        Ok(made)
    }

    /// Returns the images that a build needs. Pulls those that are missing.
    async fn bases(
        &self,
        owner: UserId,
        dockerfile: &Dockerfile,
        pull: PullPolicy,
        operation: &Operation,
    ) -> Result<Vec<Base>, BuildError> {
        let mut bases = Vec::new();
        for (source, name) in &dockerfile.bases {
            let found = match pull {
                PullPolicy::Always => None,
                PullPolicy::Missing | PullPolicy::Never => self.own_base(owner, name)?,
            };
            let image = match found {
                Some(image) => image,
                None if pull == PullPolicy::Never => {
                    return Err(ImageError::NotFound(name.clone()).into());
                }
                None => {
                    operation.write(format!("pulling {name}\n").as_bytes());
                    ImageRow::clone(&*self.pulled(owner, name).await?)
                }
            };
            bases.push(Base { names: [source.clone(), name.clone()], image });
        }
        Ok(bases)
    }

    /// Returns an image with layers that a user can use.
    fn own_base(&self, owner: UserId, name: &str) -> Result<Option<ImageRow>, ImageError> {
        match self.usable_image(owner, name) {
            Ok(UsableImage::Owned(row) | UsableImage::Shared { row, .. }) => Ok(Some(row)),
            Ok(UsableImage::Host(_)) => Err(ImageError::NoLayers(name.to_owned())),
            Err(ImageError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the sandbox to create for a build, whose cache is made if it is missing.
    async fn build_sandbox(
        &self,
        owner: UserId,
        request: &BuildRequest,
    ) -> Result<SandboxRequest, BuildError> {
        let volume = self.build_cache(owner).await?;
        let failed = |error: CreateError| BuildError::Create(Box::new(error));
        let mount = cache::MOUNT.parse().map_err(|_| BuildError::Builder("no mount".to_owned()))?;
        Ok(SandboxRequest {
            name: Some(build_name().map_err(failed)?),
            cpus: request.cpus.or_else(|| CpuCount::try_from(CPUS).ok()),
            memory: request.memory.or_else(|| MemoryMib::try_from(MEMORY_MIB).ok()),
            keep_hot: true,
            labels: Labels::of_build(),
            image: BUILDER_IMAGE.parse().ok(),
            pull: PullPolicy::Never,
            lifetime: Some(LIFETIME),
            network: request.network,
            volumes: vec![Attach {
                name: volume,
                mount,
                kind: AttachKind::Named { read_only: false },
            }],
            ..SandboxRequest::default()
        })
    }

    /// Destroys the sandboxes of builds that an earlier daemon ran.
    pub(crate) async fn settle_builds(&self) -> Result<(), bhatti_store::StoreError> {
        let mut turns: BTreeMap<UserId, Turn> = BTreeMap::new();
        for row in self.inner.store.list_all_sandboxes()? {
            if !row.spec.labels.is_of_build() {
                continue;
            }
            // The owner's next build waits until the cache is free.
            let turn = match turns.get(&row.owner) {
                Some(turn) => Arc::clone(turn),
                None => Arc::new(self.inner.builds.take(row.owner).await),
            };
            turns.insert(row.owner, Arc::clone(&turn));
            let (control, owner, id, turn) = (self.clone(), row.owner, row.id, Some(turn));
            drop(BuildSandbox { control, owner, id, turn, is_destroyed: false });
        }
        Ok(())
    }
}

/// Refuses arguments and secrets that a build cannot have.
fn check_inputs(request: &BuildRequest) -> Result<(), DockerfileError> {
    for (what, inputs, more) in
        [("argument", &request.arguments, "_"), ("secret", &request.secrets, "_.-")]
    {
        let refused = |name: &str, rule: String| {
            Err(DockerfileError::Input { what, name: name.chars().take(200).collect(), rule })
        };
        if let Some(name) = inputs.keys().nth(INPUTS_MAX) {
            return refused(name, format!("at most {INPUTS_MAX} can be given"));
        }
        for (name, value) in inputs {
            let is_part = |c: char| c.is_ascii_alphanumeric() || more.contains(c);
            if !(1..=64).contains(&name.len())
                || !name.chars().all(is_part)
                || name.starts_with('.')
            {
                return refused(name, format!("its name has 1 to 64 letters, digits or `{more}`"));
            }
            if value.len() > VALUE_BYTES_MAX || value.contains('\0') {
                let rule =
                    format!("its value has at most {VALUE_BYTES_MAX} bytes, none of them zero");
                return refused(name, rule);
            }
        }
    }
    Ok(())
}
