//! Creating a sandbox: its specification, and whether the owner may have it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_agent::CallError;
use bhatti_node::{Extras, GuestFile, Prepared, Shape, UseError, VolumeUseError, random_token};
use bhatti_proto::ExecRequest;
use bhatti_store::{
    Attach, AttachError, InsertError, NewSandbox, SandboxRow, StoreError, TemplateRow,
};
use bhatti_types::{
    Allowance, CpuCount, DEFAULT_IMAGE, DiskMib, Environment, ImageConfig, ImageName, Labels,
    MemoryMib, NEW_FILES_BYTES_MAX, NetworkMode, NetworkSpec, OnTimeout, ParseNameError,
    QuotaExceeded, Report, SandboxId, SandboxName, SandboxSpec, SecretName, SnapshotId, TimeLimit,
    UserId, VOLUMES_MAX,
};
use tracing::warn;

use crate::disk_quota::DiskQuotaError;
use crate::image_errors::{ImageCommandError, ImageError};
use crate::images::PullPolicy;
use crate::networks::NetworkError;
use crate::secrets::SecretError;
use crate::{Control, Inner};

/// A request to create a sandbox. Absent fields get defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxRequest {
    /// The name; `sandbox-` and six hex digits if absent.
    pub name: Option<SandboxName>,
    /// The number of vCPUs; one if absent.
    pub cpus: Option<CpuCount>,
    /// The memory; 512 MiB if absent.
    pub memory: Option<MemoryMib>,
    /// The size of the root disk; that of the image if absent.
    pub disk: Option<DiskMib>,
    /// The environment of the sandbox's processes.
    pub environment: Environment,
    /// Whether the sandbox stays hot while it is unused.
    pub keep_hot: bool,
    /// Whether the sandbox boots instead of being forked from a base snapshot.
    pub cold_boot: bool,
    /// The labels.
    pub labels: Labels,
    /// The secrets that become variables of the environment.
    pub secrets: Vec<SecretName>,
    /// A script that runs when the guest is ready; none if empty.
    pub init: String,
    /// The image to start from; the default image if absent.
    pub image: Option<ImageName>,
    /// When the image is pulled.
    pub pull: PullPolicy,
    /// Whether the image's command runs as a job that restarts with the sandbox.
    pub start: bool,
    /// Files to write into the new sandbox.
    pub files: Vec<FileRequest>,
    /// The time after which the sandbox is destroyed or stopped; never if absent.
    pub lifetime: Option<Duration>,
    /// What happens after that time.
    pub on_timeout: OnTimeout,
    /// The network mode; the host's default if absent.
    pub network: Option<NetworkMode>,
    /// Ranges that the sandbox may reach in addition to the internet.
    pub allow: Allowance,
    /// The volumes to attach, in the order of their mounts.
    pub volumes: Vec<Attach>,
    /// The snapshot to start from in place of the image.
    pub snapshot: Option<SnapshotId>,
    /// See [`SandboxSpec::annex`].
    pub annex: Option<String>,
}

impl From<TemplateRow> for SandboxRequest {
    fn from(row: TemplateRow) -> Self {
        Self {
            cpus: Some(row.cpus),
            memory: Some(row.memory),
            disk: row.disk,
            environment: row.environment,
            labels: row.labels,
            secrets: row.secrets,
            init: row.init,
            image: Some(row.image),
            snapshot: row.snapshot,
            ..Self::default()
        }
    }
}

/// A file to write into a new sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileRequest {
    /// The absolute path.
    pub path: String,
    /// The content.
    pub content: Vec<u8>,
    /// The permission bits in octal; 0644 if empty.
    pub mode: String,
}

/// An admitted specification of a sandbox that is not created yet.
pub(crate) struct Admitted {
    pub(crate) owner: UserId,
    pub(crate) spec: SandboxSpec,
    /// The values of the secrets.
    pub(crate) secrets: BTreeMap<String, String>,
    pub(crate) files: BTreeMap<String, GuestFile>,
    pub(crate) time_limit: TimeLimit,
    pub(crate) volumes: Vec<Attach>,
}

impl Admitted {
    /// Returns the row that this would get, to test whether the store accepts it.
    pub(crate) fn sample(&self) -> Result<NewSandbox, CreateError> {
        Ok(NewSandbox {
            id: SandboxId::from_entropy(bhatti_node::random()?),
            owner: self.owner,
            spec: self.spec.clone(),
            origin: String::new(),
            agent_token: String::new(),
            time_limit: self.time_limit,
            volumes: self.volumes.clone(),
        })
    }
}

/// A sandbox could not be created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The owner has a sandbox of that name.
    #[error("sandbox `{0}` already exists")]
    NameTaken(SandboxName),
    /// The owner's quota is used up, or allows no sandbox of that size.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The network is refused.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A volume cannot be attached.
    #[error(transparent)]
    Attach(AttachError),
    /// The volumes contradict each other, or there are too many.
    #[error("{0}")]
    Volumes(String),
    /// The image cannot be used or pulled.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The template starts from a snapshot, which fixes this.
    #[error("the template starts from a snapshot, which has its own {0}")]
    Fixed(&'static str),
    /// The template's snapshot does not exist any more.
    #[error("the template's snapshot is gone")]
    NoSnapshot,
    /// The image has no command to start.
    #[error(transparent)]
    Command(#[from] ImageCommandError),
    /// The new sandbox cannot be used.
    #[error(transparent)]
    Use(#[from] UseError),
    /// The guest did not start the image's command.
    #[error("the image's command did not start")]
    Start(#[source] CallError),
    /// A secret cannot be read.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A file's path is not absolute.
    #[error("`{0}` is not an absolute path of a file")]
    FilePath(String),
    /// The files are too large.
    #[error(
        "the files have {bytes} bytes together; at most {NEW_FILES_BYTES_MAX} can be put into a new sandbox. Copy larger files when it is running: bhatti cp"
    )]
    FilesTooLarge {
        /// Their length.
        bytes: usize,
    },
    /// The generated name is invalid.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// The environment is too long.
    #[error("the environment is too long together with the parent's")]
    TooMuchEnvironment,
    /// The node could not create the sandbox.
    #[error(transparent)]
    Node(#[from] bhatti_node::CreateError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy(#[from] getrandom::Error),
    /// The daemon is stopping.
    #[error("the daemon stopped before the sandbox was ready")]
    Interrupted,
}

impl From<VolumeUseError> for CreateError {
    fn from(error: VolumeUseError) -> Self {
        Self::Node(error.into())
    }
}

impl From<DiskQuotaError> for CreateError {
    fn from(error: DiskQuotaError) -> Self {
        match error {
            DiskQuotaError::Quota(quota) => Self::Quota(quota),
            DiskQuotaError::Store(error) => Self::Store(error),
        }
    }
}

impl From<InsertError> for CreateError {
    fn from(error: InsertError) -> Self {
        match error {
            InsertError::NameTaken(name) => Self::NameTaken(name),
            InsertError::Quota(quota) | InsertError::Attach(AttachError::Quota(quota)) => {
                Self::Quota(quota)
            }
            InsertError::Attach(error) => Self::Attach(error),
            InsertError::Store(error) => Self::Store(error),
        }
    }
}

impl Control {
    /// Creates a sandbox and waits until commands can be run in it.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. Nothing of the sandbox is left then.
    ///
    /// # Cancel safety
    ///
    /// A creation that has begun continues.
    pub async fn create(
        &self,
        owner: UserId,
        request: SandboxRequest,
    ) -> Result<SandboxRow, CreateError> {
        let store = &self.inner.store;
        if let Some(id) = request.snapshot {
            let snapshot = store.get_snapshot(id)?.ok_or(CreateError::NoSnapshot)?;
            if snapshot.owner != owner && !store.is_public_snapshot(id)? {
                return Err(CreateError::NoSnapshot);
            }
            return self.create_from_snapshot(owner, snapshot, request).await;
        }
        check_volumes(&request.volumes)?;
        let wanted = request.image.clone().map_or_else(|| DEFAULT_IMAGE.parse(), Ok)?;
        let mut spec = SandboxSpec {
            name: request.name.map_or_else(generated_name, Ok)?,
            cpus: request.cpus.unwrap_or(CpuCount::ONE),
            memory: request.memory.unwrap_or(MemoryMib::DEFAULT),
            disk: request.disk,
            environment: request.environment,
            keep_hot: request.keep_hot,
            labels: request.labels,
            secrets: request.secrets,
            init: request.init,
            image: wanted,
            image_config: ImageConfig::default(),
            network: NetworkSpec {
                mode: request.network.unwrap_or_else(|| self.inner.node.default_network()),
                allow: request.allow,
            },
            annex: request.annex,
        };
        if request.network == Some(NetworkMode::None) && !spec.network.allow.ranges().is_empty() {
            return Err(NetworkError::NothingToAllow.into());
        }
        let files = guest_files(request.files)?;
        // All that can be refused is refused before there is a row.
        store.admit_sandbox(owner, &spec)?;
        // A new sandbox has few files at first. An owner over the limit gets no sandbox.
        let _disk = self.admit_disk(owner, 0).await?;
        store.admit_attach(owner, &request.volumes).map_err(InsertError::from)?;
        let network_and_secrets =
            self.admit_network_and_secrets(owner, spec.clone(), request.volumes.clone()).await?;
        // After all other checks, because a pull may take minutes.
        let image = self.image_of_new(owner, request.image, request.pull).await?;
        let command = image.config.command(Vec::new());
        if request.start && command.is_empty() {
            return Err(ImageCommandError::None(image.name).into());
        }
        (spec.image, spec.image_config) = (image.name, image.config);
        let shape = Shape {
            image: spec.image.clone(),
            root: image.root,
            cpus: spec.cpus,
            memory: spec.memory,
            disk: spec.disk,
            has_network: spec.network.mode == NetworkMode::Nat,
            volumes: request.volumes.len(),
            cold_boot: request.cold_boot,
        };
        let admitted = Admitted {
            files,
            time_limit: time_limit(request.lifetime, request.on_timeout),
            spec,
            ..network_and_secrets
        };
        let prepared = self.inner.node.prepare(owner, shape).await?;
        let row = self.create_from(admitted, prepared).await?;
        if request.start
            && let Err(error) = self.start_job(&row, command).await
        {
            // Nothing half-made stays.
            if let Err(left) = self.destroy(owner, &row.id.to_string()).await {
                warn!(sandbox = %row.id, error = %Report(&left), "Failed to destroy a sandbox whose command did not start");
            }
            return Err(error);
        }
        Ok(row)
    }

    /// Runs a command in a new sandbox as a job that restarts with the sandbox.
    async fn start_job(&self, row: &SandboxRow, command: Vec<String>) -> Result<(), CreateError> {
        let used = self.enter(row.owner, &row.id.to_string()).await?;
        let stop_signal = row.spec.image_config.stop_signal_number();
        let exec =
            ExecRequest { argv: command, restart: true, stop_signal, ..ExecRequest::default() };
        used.agent.create_detached(exec).await.map_err(CreateError::Start)?;
        Ok(())
    }

    /// Admits a sandbox without files that never expires.
    pub(crate) async fn admit(
        &self,
        owner: UserId,
        spec: SandboxSpec,
        volumes: Vec<Attach>,
    ) -> Result<Admitted, CreateError> {
        self.inner.store.admit_sandbox(owner, &spec)?;
        self.admit_network_and_secrets(owner, spec, volumes).await
    }

    async fn admit_network_and_secrets(
        &self,
        owner: UserId,
        spec: SandboxSpec,
        volumes: Vec<Attach>,
    ) -> Result<Admitted, CreateError> {
        let secrets = self.inner.secrets.read(owner, &spec.secrets)?;
        self.admit_network(owner, &spec.network).await?;
        let files = BTreeMap::new();
        Ok(Admitted { owner, spec, secrets, files, time_limit: TimeLimit::default(), volumes })
    }

    /// Inserts the row of an admitted sandbox, and has the node create its VM.
    pub(crate) async fn create_from(
        &self,
        admitted: Admitted,
        prepared: Prepared,
    ) -> Result<SandboxRow, CreateError> {
        let Admitted { owner, spec, secrets, files, time_limit, volumes } = admitted;
        let Inner { node, store, .. } = &*self.inner;
        let new = NewSandbox {
            id: prepared.id(),
            owner,
            spec,
            origin: prepared.origin(),
            agent_token: random_token()?,
            time_limit,
            volumes,
        };
        // No `await` between `prepare` and here: a canceled request must not lose a spare.
        match store.insert_sandbox(new) {
            Ok(row) => Ok(node.create(prepared, row, Extras { secrets, files }).await?),
            Err(error) => {
                node.give_back(prepared);
                Err(error.into())
            }
        }
    }
}

/// Generates a sandbox's name: `sandbox-` and six hex digits.
pub(crate) fn generated_name() -> Result<SandboxName, CreateError> {
    let [a, b, c] = bhatti_node::random()?;
    Ok(format!("sandbox-{a:02x}{b:02x}{c:02x}").parse()?)
}

/// Refuses volumes that cannot be attached to one sandbox.
fn check_volumes(volumes: &[Attach]) -> Result<(), CreateError> {
    if volumes.len() > VOLUMES_MAX {
        let number = volumes.len();
        return Err(CreateError::Volumes(format!(
            "{number} volumes are too many: a sandbox has at most {VOLUMES_MAX}"
        )));
    }
    for (index, volume) in volumes.iter().enumerate() {
        for other in &volumes[..index] {
            if other.mount == volume.mount {
                let mount = &volume.mount;
                return Err(CreateError::Volumes(format!(
                    "two volumes have the mount point `{mount}`"
                )));
            }
            let (above, below) = (volume.mount.as_str(), other.mount.as_str());
            if below.strip_prefix(above).is_some_and(|rest| rest.starts_with('/')) {
                return Err(CreateError::Volumes(format!(
                    "the volume at `{above}` would hide the one at `{below}`: name it first"
                )));
            }
            if other.name == volume.name {
                let name = &volume.name;
                return Err(CreateError::Volumes(format!("two volumes have the name `{name}`")));
            }
        }
    }
    Ok(())
}

/// Returns the first full second since 1970 at which `time` from now has passed.
pub fn unix_seconds_after(time: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let then = now.saturating_add(time);
    then.as_secs() + u64::from(then.subsec_nanos() > 0)
}

/// Returns a time limit that begins now.
pub(crate) fn time_limit(lifetime: Option<Duration>, on_timeout: OnTimeout) -> TimeLimit {
    TimeLimit { expires_at: lifetime.map(unix_seconds_after), on_timeout }
}

/// Returns the files by path, checked.
pub(crate) fn guest_files(
    files: Vec<FileRequest>,
) -> Result<BTreeMap<String, GuestFile>, CreateError> {
    let bytes = files.iter().map(|file| file.content.len()).sum();
    if bytes > NEW_FILES_BYTES_MAX {
        return Err(CreateError::FilesTooLarge { bytes });
    }
    let file = |FileRequest { path, content, mode }: FileRequest| {
        let is_file = path.starts_with('/') && !path.ends_with('/') && !path.contains('\0');
        if !is_file || path.split('/').any(|part| part == "..") {
            return Err(CreateError::FilePath(path));
        }
        Ok((path, GuestFile { content, mode }))
    };
    files.into_iter().map(file).collect()
}
