//! Forking a running sandbox.

use std::sync::Arc;
use std::time::Duration;

use bhatti_node::{ForkSource, MadeFrom, SnapshotInfo, TransitionError, UseError, volumes_of_fork};
use bhatti_store::SandboxRow;
use bhatti_types::{
    Environment, Labels, OnTimeout, Report, SandboxName, SandboxSpec, SecretName, UserId,
};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{error, info};

use crate::Control;
use crate::create::{Admitted, CreateError, generated_name, time_limit};

/// Maximum number of forks of one request.
pub const FORKS_MAX: u32 = 100;

/// A request to fork a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForkRequest {
    /// The number of forks; one if absent.
    pub count: Option<u32>,
    /// The name of the fork; the prefix of the names of several forks.
    pub name: Option<SandboxName>,
    /// The environment of processes that start later.
    pub environment: Environment,
    /// Whether the forks inherit the parent's environment.
    pub inherit_environment: bool,
    /// The labels of the forks.
    pub labels: Labels,
    /// The secrets of the forks. They inherit none of the parent's.
    pub secrets: Vec<SecretName>,
    /// The time after which the forks are destroyed or stopped; never if absent.
    pub lifetime: Option<Duration>,
    /// What happens after that time.
    pub on_timeout: OnTimeout,
}

/// The result of a fork.
#[derive(Debug)]
pub struct Forked {
    /// The forks, by name.
    pub sandboxes: Vec<SandboxRow>,
    /// The kind and size of the parent's saved memory.
    pub snapshot: SnapshotInfo,
    /// How long the parent's processes were stopped.
    pub paused: Duration,
}

/// A sandbox could not be forked. No fork is left, and the parent is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The parent cannot be used.
    #[error(transparent)]
    Use(#[from] UseError),
    /// The parent could not be saved.
    #[error(transparent)]
    Parent(#[from] TransitionError),
    /// A fork could not be created.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The number of forks is out of range.
    #[error("{0} forks requested; 1 to {FORKS_MAX} can be made at once")]
    Count(u32),
}

impl Control {
    /// Forks a sandbox: its memory, its processes and its disks. The parent runs on.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. No fork is left then.
    ///
    /// # Cancel safety
    ///
    /// A fork that has begun is finished.
    pub async fn fork(
        &self,
        owner: UserId,
        id_or_name: &str,
        request: ForkRequest,
    ) -> Result<Forked, ForkError> {
        let (control, parent) = (self.clone(), id_or_name.to_owned());
        let forked = tokio::spawn(async move { control.fork_all(owner, &parent, request).await });
        forked.await.map_err(|_| CreateError::Interrupted)?
    }

    async fn fork_all(
        &self,
        owner: UserId,
        id_or_name: &str,
        request: ForkRequest,
    ) -> Result<Forked, ForkError> {
        let count = request.count.unwrap_or(1);
        if !(1..=FORKS_MAX).contains(&count) {
            return Err(ForkError::Count(count));
        }
        let parent = self.find(owner, id_or_name)?;
        // All that can be refused is refused before the parent pauses and its disk gets a layer.
        parent.state.admit_use().map_err(UseError::from)?;
        let forks = self.admit_forks(owner, &parent, &request, count).await?;
        let _disk = self.admit_save(&parent).await.map_err(CreateError::from)?;
        let node = &self.inner.node;
        let source = node.save_for_forks(parent.id).await?;
        let made = self.make_forks(owner, &source, forks).await;
        let (snapshot, paused) = (source.info, source.paused);
        node.remove_fork_source(source).await;
        let sandboxes = made?;
        let sandbox = Some((parent.id, parent.spec.name.to_string()));
        let forks: Vec<String> = sandboxes.iter().map(|fork| fork.id.to_string()).collect();
        self.record("sandbox.forked", owner, sandbox, json!({ "forks": forks }));
        let pause_ms = u64::try_from(paused.as_millis()).unwrap_or(u64::MAX);
        info!(
            sandbox = %parent.id,
            count,
            pause_ms,
            memory_bytes = snapshot.memory_bytes,
            "Sandbox forked"
        );
        Ok(Forked { sandboxes, snapshot, paused })
    }

    /// Admits the requested forks, all or none.
    async fn admit_forks(
        &self,
        owner: UserId,
        parent: &SandboxRow,
        request: &ForkRequest,
        count: u32,
    ) -> Result<Vec<Admitted>, CreateError> {
        let mut forks = Vec::new();
        for number in 1..=count {
            let spec = fork_spec(parent, request, number, count)?;
            let volumes = volumes_of_fork(&parent.volumes, MadeFrom::Running);
            let admitted = self.admit(owner, spec, volumes).await?;
            let time_limit = time_limit(request.lifetime, request.on_timeout);
            forks.push(Admitted { time_limit, ..admitted });
        }
        let rows = forks.iter().map(Admitted::sample).collect::<Result<Vec<_>, _>>()?;
        self.inner.store.admit_sandboxes(rows)?;
        Ok(forks)
    }

    /// Creates all forks. If one fails, destroys the others.
    async fn make_forks(
        &self,
        owner: UserId,
        source: &ForkSource,
        admitted: Vec<Admitted>,
    ) -> Result<Vec<SandboxRow>, CreateError> {
        let mut forks = JoinSet::new();
        let turns = Arc::new(Semaphore::new(forks_at_once()));
        // All of them first: a fork that has begun is not given up.
        let prepared: Result<Vec<_>, _> = admitted.iter().map(|_| source.prepared()).collect();
        for (admitted, prepared) in admitted.into_iter().zip(prepared?) {
            let (control, turns) = (self.clone(), Arc::clone(&turns));
            forks.spawn(async move {
                let _turn = turns.acquire_owned().await;
                control.create_from(admitted, prepared).await
            });
        }
        let (mut made, mut failed) = (Vec::new(), None);
        for fork in forks.join_all().await {
            match fork {
                Ok(row) => made.push(row),
                Err(error) => failed = Some(error),
            }
        }
        let Some(failed) = failed else {
            made.sort_by(|one, other| one.spec.name.as_str().cmp(other.spec.name.as_str()));
            return Ok(made);
        };
        for row in made {
            if let Err(error) = self.destroy(owner, &row.id.to_string()).await {
                error!(
                    sandbox = %row.id,
                    error = %Report(&error),
                    "Failed to remove a fork after another fork of the request failed"
                );
            }
        }
        Err(failed)
    }
}

/// Returns how many forks are created at the same time: one per processor.
fn forks_at_once() -> usize {
    std::thread::available_parallelism().map_or(2, |processors| processors.get())
}

fn fork_spec(
    parent: &SandboxRow,
    request: &ForkRequest,
    number: u32,
    count: u32,
) -> Result<SandboxSpec, CreateError> {
    let name = match &request.name {
        Some(name) if count == 1 => name.clone(),
        Some(name) => format!("{name}-{number}").parse()?,
        None => generated_name()?,
    };
    let mut environment = request.environment.as_map().clone();
    if request.inherit_environment {
        for (name, value) in parent.spec.environment.as_map() {
            environment.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    // Each half is within the limit. Their sum may not be.
    let environment =
        Environment::try_from(environment).map_err(|_| CreateError::TooMuchEnvironment)?;
    Ok(SandboxSpec {
        name,
        cpus: parent.spec.cpus,
        memory: parent.spec.memory,
        disk: parent.spec.disk,
        environment,
        keep_hot: false,
        labels: request.labels.clone(),
        secrets: request.secrets.clone(),
        init: parent.spec.init.clone(),
        image: parent.spec.image.clone(),
        image_config: parent.spec.image_config.clone(),
        network: parent.spec.network.clone(),
        annex: parent.spec.annex.clone(),
    })
}
