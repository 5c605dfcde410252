//! Forking a sandbox that runs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::SnapshotInfo;
use bhatti_store::SandboxRow;
use bhatti_types::{Environment, Labels, Report, SandboxName, SandboxSpec, SecretName, UserId};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::create::{Beginning, CreateError, New};
use crate::driver::{Request, TransitionError};
use crate::identity::random_hex;
use crate::steps::{self, Step};
use crate::volumes::{self, MadeFrom};
use crate::{Supervisor, UseError};

/// How the directories begin in which forks find their parent.
pub(crate) const FORKING: &str = ".fork-";

/// The most forks that one request makes.
pub const FORKS_MAX: u32 = 100;

/// What is asked of a fork.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForkRequest {
    /// How many; one if absent.
    pub count: Option<u32>,
    /// The name of the fork; of several, what their names begin with.
    pub name: Option<SandboxName>,
    /// The environment of processes to come.
    pub environment: Environment,
    /// Whether the parent's environment is theirs too.
    pub inherit_environment: bool,
    /// Their labels.
    pub labels: Labels,
    /// Their secrets. The parent's are never theirs unless named here.
    pub secrets: Vec<SecretName>,
}

/// Forks that were made.
#[derive(Debug)]
pub struct Forked {
    /// The sandboxes.
    pub sandboxes: Vec<SandboxRow>,
    /// What was saved of the parent.
    pub snapshot: SnapshotInfo,
    /// How long the parent's processes stood still.
    pub paused: Duration,
}

/// A sandbox could not be forked. No fork is left, and the parent is what it was.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// There is no such parent.
    #[error(transparent)]
    Use(#[from] UseError),
    /// It could not be saved.
    #[error(transparent)]
    Parent(#[from] TransitionError),
    /// A fork could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// So many are not made at once.
    #[error("{0} forks are asked for; 1 to {FORKS_MAX} can be made at once")]
    Count(u32),
}

impl Supervisor {
    /// Forks a sandbox: its memory, its processes and its disks. It goes on meanwhile.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; no fork is left then.
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
        let (supervisor, parent) = (self.clone(), id_or_name.to_owned());
        let forked =
            tokio::spawn(async move { supervisor.fork_all(owner, &parent, request).await });
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
        let handle = self.handle(parent.id, id_or_name)?;
        // All that can be refused is, before the parent stands still and its disk gets another layer.
        parent.state.admit_use().map_err(UseError::from)?;
        let forks = self.admit_forks(owner, &parent, &request, count).await?;
        let _disk = self.shared.admit_save(&parent).await.map_err(CreateError::from)?;
        let name = random_hex().map_err(CreateError::Entropy)?;
        let snapshot = self.shared.config.snapshots_dir.join(format!("{FORKING}{name}"));
        let directory = snapshot.clone();
        let made_from = MadeFrom::Running;
        let saved =
            handle.ask(|reply| Request::Save { directory, memory: None, made_from, reply }).await?;
        steps::reached(Step::Frozen, self.shared.config.fault);
        let made = self.make_forks(owner, &parent, forks, &snapshot).await;
        // The forks have hard links of all that they stand on.
        if let Err(error) = tokio::fs::remove_dir_all(&snapshot).await {
            warn!(path = %snapshot.display(), %error, "Failed to remove what forks were made from");
        }
        let sandboxes = made?;
        self.shared.metrics.fork_pause.observe(saved.paused.as_secs_f64());
        let sandbox = Some((parent.id, parent.spec.name.to_string()));
        let forks: Vec<String> = sandboxes.iter().map(|fork| fork.id.to_string()).collect();
        self.record("sandbox.forked", owner, sandbox, serde_json::json!({ "forks": forks }));
        let pause_ms = u64::try_from(saved.paused.as_millis()).unwrap_or(u64::MAX);
        info!(sandbox = %parent.id, count, pause_ms, memory_bytes = saved.info.memory_bytes, "Sandbox forked");
        Ok(Forked { sandboxes, snapshot: saved.info, paused: saved.paused })
    }

    /// The forks that are asked for, if their owner may have all of them.
    async fn admit_forks(
        &self,
        owner: UserId,
        parent: &SandboxRow,
        request: &ForkRequest,
        count: u32,
    ) -> Result<Vec<New>, CreateError> {
        let mut forks = Vec::new();
        for number in 1..=count {
            let spec = fork_spec(parent, request, number, count)?;
            let volumes = volumes::of_fork(&parent.volumes, MadeFrom::Running);
            forks.push(New::of(&self.shared, owner, spec, volumes).await?);
        }
        let rows = forks.iter().map(New::sample).collect::<Result<Vec<_>, _>>()?;
        self.shared.store.admit_sandboxes(rows)?;
        Ok(forks)
    }

    async fn make_forks(
        &self,
        owner: UserId,
        parent: &SandboxRow,
        news: Vec<New>,
        snapshot: &std::path::Path,
    ) -> Result<Vec<SandboxRow>, CreateError> {
        let mut forks = JoinSet::new();
        let turns = Arc::new(Semaphore::new(forks_at_once()));
        for new in news {
            let beginning = Beginning::Saved {
                snapshot: PathBuf::from(snapshot),
                token: parent.agent_token.clone(),
                origin: format!("sandbox {}", parent.id),
            };
            let (supervisor, turns) = (self.clone(), Arc::clone(&turns));
            forks.spawn(async move {
                let _turn = turns.acquire_owned().await;
                supervisor.create_from(new, beginning).await
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
                error!(sandbox = %row.id, error = %Report(&error), "Failed to remove a fork whose sibling could not be made");
            }
        }
        Err(failed)
    }
}

/// Forks that come up at the same time: more than the processors can run only take turns.
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
        None => crate::create::made_up_name()?,
    };
    let mut environment = request.environment.as_map().clone();
    if request.inherit_environment {
        for (name, value) in parent.spec.environment.as_map() {
            environment.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    // Both halves were checked; only their sum can be too long.
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
        network: parent.spec.network.clone(),
    })
}
