//! Templates that are built from steps.
//!
//! The steps run in a sandbox, one after the other. After each, the sandbox is saved as a snapshot
//! that is found by the content of the step and of all before it. So the next build begins after
//! the last step that is unchanged. At last the start command runs until it is ready, and the
//! snapshot that is taken then is where the sandboxes of the template begin.

mod files;
mod session;
mod steps;

use std::collections::BTreeMap;
use std::sync::Arc;

use bhatti_store::{
    SandboxRow, SnapshotKind, SnapshotRow, StoreError, TemplateInsertError, TemplateRow,
};
use bhatti_types::{
    CpuCount, DiskMib, Environment, ImageConfig, ImageName, Labels, MemoryMib, Report, SandboxName,
    TemplateId, TemplateName, UserId,
};
use serde_json::json;
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use crate::Control;
use crate::build::{BuildSandbox, CreateFrom, LIFETIME, Turn, build_name};
use crate::build_errors::{STEPS_MAX, TemplateBuildError};
use crate::create::{CreateError, SandboxRequest};
use crate::images::PullPolicy;
use crate::operation_errors::OperationFailure;
use crate::operations::{Made, Operation, OperationKind};

pub use files::FilesBelow;
pub use steps::Step;

use files::StepFiles;
use session::Session;
use steps::key;

/// Version of the keys of cached steps.
const KEYS: &str = "1";

/// Maximum length of a step, in bytes.
const STEP_BYTES_MAX: usize = 64 << 10;

/// Maximum number of a user's cached steps. The oldest go first.
const CACHED_MAX: usize = 64;

/// A request to build a template.
#[derive(Clone, Debug)]
pub struct TemplateBuild {
    /// The name. A template of the owner with that name is replaced.
    pub name: TemplateName,
    /// The template to begin with.
    pub template: Option<TemplateRow>,
    /// The image to begin with, if there is no template; the default image if absent.
    pub image: Option<ImageName>,
    /// When the image is pulled.
    pub pull: PullPolicy,
    /// The steps.
    pub steps: Vec<Step>,
    /// The command that runs in the template's sandboxes from their beginning.
    pub start: Option<String>,
    /// A command that succeeds when the start command is ready.
    pub ready: Option<String>,
    /// The number of vCPUs; one if absent.
    pub cpus: Option<CpuCount>,
    /// The memory; 512 MiB if absent.
    pub memory: Option<MemoryMib>,
    /// The size of the root disk; that of the image if absent.
    pub disk: Option<DiskMib>,
    /// Whether all steps run.
    pub no_cache: bool,
    /// The shell that runs the commands; that of the image if empty.
    pub shell: Vec<String>,
    /// Further names of the template.
    pub aliases: Vec<TemplateName>,
    /// What a second API keeps with the template.
    pub annex: Option<String>,
    /// Whether all users can create sandboxes from it.
    pub public: bool,
}

impl From<TemplateRow> for Made {
    fn from(row: TemplateRow) -> Self {
        Self::Template(Arc::new(row))
    }
}

/// Returns a template under other names.
fn named(row: &TemplateRow, names: Vec<TemplateName>) -> Result<Vec<TemplateRow>, CreateError> {
    let named = |name| Ok(TemplateRow { id: template_id()?, name, ..row.clone() });
    names.into_iter().map(named).collect()
}

fn template_id() -> Result<TemplateId, CreateError> {
    bhatti_node::random().map(TemplateId::from_entropy).map_err(CreateError::Entropy)
}

/// Where a build begins: the state after the last unchanged step.
struct Beginning {
    guard: BuildSandbox,
    sandbox: SandboxRow,
    /// The number of steps that are done.
    done: usize,
}

impl Control {
    /// Begins to build a template. `files` are tar archives of what the steps copy.
    ///
    /// # Errors
    ///
    /// Returns an error if the request is not valid, if this host cannot build, or if the owner
    /// has too many running operations.
    pub async fn build_template(
        &self,
        owner: UserId,
        request: TemplateBuild,
        files: Vec<FilesBelow>,
    ) -> Result<Operation, OperationFailure> {
        self.check_template(&request)?;
        let id = bhatti_node::random()
            .map_err(|error| TemplateBuildError::Create(CreateError::Entropy(error)))?;
        let lengths = files.iter().map(|(_, file)| Ok(file.metadata()?.len()));
        let bytes = lengths.sum::<std::io::Result<u64>>().map_err(TemplateBuildError::Write)?;
        let reserved = self.admit_disk(owner, bytes).await;
        let reserved = reserved.map_err(|error| TemplateBuildError::Create(error.into()))?;
        let name = request.name.to_string();
        let control = self.clone();
        let work = |operation: Operation| async move {
            let _reserved = reserved;
            control.built_template(owner, request, files, &operation).await
        };
        Ok(self.inner.operations.begin(owner, id, (OperationKind::Template, &name), work)?)
    }

    /// Refuses a request that would fail when its files have been received.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`build_template`](Self::build_template).
    pub fn check_template(&self, request: &TemplateBuild) -> Result<(), TemplateBuildError> {
        if !self.inner.node.capabilities().saves_memory {
            return Err(TemplateBuildError::CannotSave);
        }
        if request.steps.len() > STEPS_MAX {
            return Err(TemplateBuildError::TooMany(request.steps.len()));
        }
        let mut environment = BTreeMap::new();
        for step in &request.steps {
            if let Step::Env(variables) | Step::ExpandedEnv(variables) = step {
                environment.extend(variables.clone());
            }
        }
        Environment::try_from(environment)?;
        for command in request.start.iter().chain(&request.ready) {
            if command.len() > STEP_BYTES_MAX || command.contains('\0') {
                return Err(TemplateBuildError::Command);
            }
        }
        for (number, step) in (1..).zip(&request.steps) {
            let texts = step.texts();
            let bytes: usize = texts.iter().map(|text| text.len()).sum();
            if bytes > STEP_BYTES_MAX || texts.iter().any(|text| text.contains('\0')) {
                return Err(TemplateBuildError::Step(number));
            }
            match step {
                Step::Copy { to: path, .. } | Step::Workdir(path) if !path.starts_with('/') => {
                    return Err(TemplateBuildError::Target(path.clone()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn built_template(
        &self,
        owner: UserId,
        request: TemplateBuild,
        files: Vec<FilesBelow>,
        operation: &Operation,
    ) -> Result<TemplateRow, TemplateBuildError> {
        let turn = Arc::new(self.inner.builds.take(owner).await);
        let room = self.archive_room(owner).await.map_err(CreateError::Image)?;
        let files = (!files.is_empty()).then(|| Arc::new(StepFiles::new(files, room)));
        let base = self.template_base(owner, &request).await?;
        let keys = step_keys(request.steps.clone(), files.clone(), base.key.clone()).await?;
        let Beginning { guard, sandbox, done } =
            self.begin_template(owner, &request, &base, &keys, turn).await?;
        let env = request.template.as_ref().map(|it| it.environment.as_map().clone());
        let mut session = Session {
            control: self,
            sandbox,
            base_env: env.unwrap_or_default(),
            config: base.config,
            shell: request.shell.clone(),
            operation,
            files,
        };
        let built = session.run(&request, &keys, done).await;
        let kept = match built {
            Ok(row) => {
                let control = self.clone();
                // A canceled build leaves no snapshot without a template.
                let kept = tokio::spawn(async move {
                    let snapshot = control.save_hidden(row, SnapshotKind::Template).await?;
                    control.keep_template(owner, request, snapshot).await
                });
                kept.await.map_err(std::io::Error::other)?
            }
            Err(error) => Err(error),
        };
        guard.destroy().await;
        kept
    }

    /// Stores the template of a snapshot, in place of the one of that name.
    async fn keep_template(
        &self,
        owner: UserId,
        request: TemplateBuild,
        snapshot: SnapshotRow,
    ) -> Result<TemplateRow, TemplateBuildError> {
        let base = request.template;
        let row = TemplateRow {
            id: template_id()?,
            owner,
            name: request.name,
            image: snapshot.image.clone(),
            cpus: snapshot.cpus,
            memory: snapshot.memory,
            disk: snapshot.disk,
            environment: base
                .as_ref()
                .map_or_else(Environment::default, |it| it.environment.clone()),
            labels: base.as_ref().map_or_else(Labels::default, |it| it.labels.clone()),
            secrets: base.as_ref().map_or_else(Vec::new, |it| it.secrets.clone()),
            init: base.map_or_else(String::new, |it| it.init),
            snapshot: Some(snapshot.id),
            annex: request.annex,
            public: request.public,
            created_at: String::new(),
        };
        let mut rows = named(&row, request.aliases)?;
        rows.push(row.clone());
        if let Err(error) = self.keep_templates(&rows).await {
            self.forget_snapshot(&snapshot).await;
            return Err(error.into());
        }
        info!(template = %row.name, "Built a template");
        self.record("template.built", owner, None, json!({ "template": row.name.as_str() }));
        let kept = self.inner.store.find_template(owner, &row.id.to_string())?;
        kept.ok_or(TemplateBuildError::Store(StoreError::NoSuchRow))
    }

    /// Returns the settings of processes that the sandboxes of a template have. Those of a template
    /// without a snapshot come from its image, and are empty here.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn settings_of_template(&self, row: &TemplateRow) -> Result<ImageConfig, StoreError> {
        let snapshot = row.snapshot.map(|id| self.inner.store.get_snapshot(id)).transpose()?;
        Ok(snapshot.flatten().map(|snapshot| snapshot.image_config).unwrap_or_default())
    }

    /// Gives a template further names, in place of the templates of those names: all or none.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has too many templates, or if the store fails.
    pub async fn tag_template(
        &self,
        row: &TemplateRow,
        names: Vec<TemplateName>,
    ) -> Result<(), TemplateBuildError> {
        Ok(self.keep_templates(&named(row, names)?).await?)
    }

    async fn keep_templates(&self, rows: &[TemplateRow]) -> Result<(), TemplateInsertError> {
        for replaced in self.inner.store.replace_templates(rows)? {
            self.forget_template(&replaced).await;
        }
        Ok(())
    }

    /// Removes the snapshot of a template that is gone, unless another template has it.
    pub(crate) async fn forget_template(&self, row: &TemplateRow) {
        let Some(id) = row.snapshot else { return };
        let store = &self.inner.store;
        let unused = store.template_snapshots().and_then(|used| {
            if used.contains(&id.to_string()) { Ok(None) } else { store.get_snapshot(id) }
        });
        match unused {
            Ok(None) => {}
            Ok(Some(snapshot)) => self.forget_snapshot(&snapshot).await,
            Err(error) => {
                warn!(template = %row.name, error = %Report(&error), "Failed to find a template's snapshot");
            }
        }
    }

    /// Removes a snapshot that nothing uses. The next daemon tries again.
    pub(crate) async fn forget_snapshot(&self, snapshot: &SnapshotRow) {
        if let Err(error) = self.remove_snapshot(snapshot).await {
            warn!(snapshot = %snapshot.id, error = %Report(&error), "Failed to remove an unused snapshot");
        }
    }

    /// Removes the snapshots of a user that the user does not see: cached steps, and what canceled
    /// builds have left.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub async fn forget_hidden_snapshots(&self, owner: UserId) -> Result<(), StoreError> {
        self.forget_steps(owner, 0).await?;
        self.forget_unused(Some(owner)).await
    }

    /// Removes a user's cached steps, except for the `kept` newest ones. Returns whether there were
    /// any.
    pub(crate) async fn forget_steps(
        &self,
        owner: UserId,
        kept: usize,
    ) -> Result<bool, StoreError> {
        let snapshots = self.inner.store.list_snapshots(Some(owner))?;
        let steps = snapshots.into_iter().filter(|it| matches!(it.kind, SnapshotKind::Step(_)));
        let surplus: Vec<_> = steps.skip(kept).collect();
        for snapshot in &surplus {
            self.forget_snapshot(snapshot).await;
        }
        Ok(!surplus.is_empty())
    }

    /// Removes the snapshots of templates that no template has: an earlier daemon, or a canceled
    /// build, has left them.
    pub(crate) async fn forget_unused(&self, owner: Option<UserId>) -> Result<(), StoreError> {
        let store = &self.inner.store;
        let snapshots = store.list_snapshots(owner)?;
        let used = store.template_snapshots()?;
        for snapshot in snapshots {
            let is_unused = !used.contains(&snapshot.id.to_string());
            if snapshot.kind == SnapshotKind::Template && is_unused {
                self.forget_snapshot(&snapshot).await;
            }
        }
        Ok(())
    }

    /// Finds what a template begins with.
    async fn template_base(
        &self,
        owner: UserId,
        request: &TemplateBuild,
    ) -> Result<Base, TemplateBuildError> {
        let store = &self.inner.store;
        let snapshot = match request.template.as_ref().and_then(|template| template.snapshot) {
            Some(id) => Some(store.get_snapshot(id)?.ok_or(CreateError::NoSnapshot)?),
            None => None,
        };
        let mut new = SandboxRequest {
            cpus: request.cpus,
            memory: request.memory,
            disk: request.disk,
            image: request.image.clone(),
            pull: request.pull,
            ..SandboxRequest::default()
        };
        if let Some(template) = &request.template {
            new.cpus = new.cpus.or(Some(template.cpus));
            new.memory = new.memory.or(Some(template.memory));
            new.disk = new.disk.or(template.disk);
            new.image = Some(template.image.clone());
            new.snapshot = template.snapshot;
        }
        let (what, config) = match snapshot {
            Some(snapshot) => (snapshot.id.to_string(), snapshot.image_config),
            None => {
                let found = self.image_of_new(owner, new.image.clone(), new.pull).await;
                let found = found.map_err(CreateError::Image)?;
                (new.image, new.pull) = (Some(found.name), PullPolicy::Never);
                (found.root.to_string(), found.config)
            }
        };
        let capabilities = self.inner.node.capabilities();
        let (cpus, memory) =
            (new.cpus.unwrap_or(CpuCount::ONE), new.memory.unwrap_or(MemoryMib::DEFAULT));
        let network = self.inner.node.default_network();
        let shape = format!("{cpus:?} {memory:?} {:?} {network:?}", new.disk);
        let texts = [KEYS, capabilities.name, &capabilities.machine, &what, &shape];
        let key = key(&[&texts[..], &[&format!("{config:?}")]].concat());
        Ok(Base { key, new, config })
    }

    /// Creates the sandbox of a build, from the result of the last step that is cached.
    async fn begin_template(
        &self,
        owner: UserId,
        request: &TemplateBuild,
        base: &Base,
        keys: &[String],
        turn: Turn,
    ) -> Result<Beginning, TemplateBuildError> {
        let new = |name: SandboxName| SandboxRequest {
            name: Some(name),
            keep_hot: true,
            labels: Labels::of_build(),
            lifetime: Some(LIFETIME),
            ..SandboxRequest::default()
        };
        let cached = if request.no_cache { 0 } else { keys.len() };
        for done in (1..=cached).rev() {
            let Some(step) = self.inner.store.find_step(owner, &keys[done - 1])? else { continue };
            let snapshot = step.id;
            let from = CreateFrom::Snapshot(Box::new(step.clone()), new(build_name()?));
            match BuildSandbox::create(self, owner, Arc::clone(&turn), from).await {
                Ok((guard, sandbox)) => return Ok(Beginning { guard, sandbox, done }),
                Err(CreateError::Node(bhatti_node::CreateError::Restore(error))) => {
                    warn!(%snapshot, error = %Report(&error), "Failed to use a cached step of a template");
                    self.forget_snapshot(&step).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        let SandboxRequest { name, keep_hot, labels, lifetime, .. } = new(build_name()?);
        let request = SandboxRequest { name, keep_hot, labels, lifetime, ..base.new.clone() };
        let from = CreateFrom::Image(request);
        let (guard, sandbox) = BuildSandbox::create(self, owner, turn, from).await?;
        Ok(Beginning { guard, sandbox, done: 0 })
    }
}

/// What a template begins with.
struct Base {
    /// The key of the state before the first step.
    key: String,
    /// The sandbox to create.
    new: SandboxRequest,
    /// The settings of its processes.
    config: ImageConfig,
}

/// Returns the key of the state after each step, which began with the state of key `base`.
async fn step_keys(
    steps: Vec<Step>,
    files: Option<Arc<StepFiles>>,
    base: String,
) -> Result<Vec<String>, TemplateBuildError> {
    let keys = spawn_blocking(move || {
        let mut keys: Vec<String> = Vec::new();
        for step in &steps {
            let before = keys.last().unwrap_or(&base);
            keys.push(step.key(before, files.as_deref())?);
        }
        Ok(keys)
    });
    keys.await.map_err(std::io::Error::other)?
}
