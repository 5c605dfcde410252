//! Compares bhatti, Docker, QEMU alone and the host: the same operation, in turns, on one machine.

mod images;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bhatti_qemu::{PROGRAM, Qemu, QemuEngine};
use bhatti_testkit::{Serve, TestDaemon, named, run, wait_for};
use tokio::time::Instant;

use crate::bench::{VM_PRACTISES, bare_fork, median, show};

/// Measured runs of each contestant, after one that does not count.
const ROUNDS: usize = 50;

/// Figures that the authors of the original system published, with their hardware. Not measured
/// here.
const PUBLISHED: &str = "\
published for the original system (Go, Firecracker), not measured here:
  Raspberry Pi 5, NVMe, 512 MB VM:  exec `true` 1.0 ms p50 (p95 1.2, p99 1.3); a command in a paused sandbox 2.5 ms;
                                    VM boot about 3.5 s; restore about 50 ms; full snapshot about 4.4 s, diff about 52 ms
  AWS a1.metal:                     exec 2.5 ms; boot 2.0 s; restore 46 ms; a command in a saved sandbox 56 ms";

/// A measured operation of one system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contestant {
    HostProcess,
    Exec,
    ContainerExec,
    DockerExec,
    Create,
    ContainerCreate,
    DockerRun,
    BareQemu,
}

impl Contestant {
    const ALL: [Self; 8] = [
        Self::HostProcess,
        Self::Exec,
        Self::ContainerExec,
        Self::DockerExec,
        Self::Create,
        Self::ContainerCreate,
        Self::DockerRun,
        Self::BareQemu,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::HostProcess => "host: fork, exec and wait of `true`",
            Self::Exec => "bhatti exec `true`, qemu",
            Self::ContainerExec => "bhatti exec `true`, docker",
            Self::DockerExec => "docker exec `true`",
            Self::Create => "bhatti create and first exec, qemu",
            Self::ContainerCreate => "bhatti create and first exec, docker",
            Self::DockerRun => "docker run --rm `true`",
            Self::BareQemu => "QEMU alone: start to agent's answer",
        }
    }

    /// Returns the contestant that this one is compared with.
    const fn against(self) -> Option<Self> {
        match self {
            Self::Exec | Self::ContainerExec => Some(Self::DockerExec),
            Self::Create | Self::ContainerCreate | Self::BareQemu => Some(Self::DockerRun),
            Self::HostProcess | Self::DockerExec | Self::DockerRun => None,
        }
    }

    const fn needs_docker(self) -> bool {
        matches!(
            self,
            Self::ContainerExec | Self::DockerExec | Self::ContainerCreate | Self::DockerRun
        )
    }
}

/// Measures and prints all contestants.
pub(crate) fn compare() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure())
}

async fn measure() -> Result<()> {
    // It must be in the network of Docker's daemon, which Docker::start leaves.
    let source = images::Source::start().await?;
    let docker = Docker::start().await;
    images::measure(&source, docker.as_ref().ok()).await?;
    let arena = Arena::start(docker.as_ref().ok()).await?;
    let there = Contestant::ALL.into_iter().filter(|one| docker.is_ok() || !one.needs_docker());
    let there: Vec<Contestant> = there.collect();
    let mut times = vec![Vec::new(); there.len()];
    for round in 0..=ROUNDS {
        // Each round begins with another contestant, so that none always runs with the caches that
        // the same other one has left.
        for turn in 0..there.len() {
            let place = (round + turn) % there.len();
            let took = arena.once(there[place]).await.context(there[place].name())?;
            if round > 0 {
                times[place].push(took);
            }
        }
    }
    arena.end().await?;
    println!("{:44} {:>4} {:>10} {:>10} {:>10} {:>10}", "", "n", "p50", "p95", "p99", "max");
    for (contestant, own) in there.iter().zip(&times) {
        show(contestant.name(), own.clone());
        let other =
            contestant.against().and_then(|other| there.iter().position(|one| *one == other));
        if let Some(other) = other {
            let ratio = median(&mut own.clone()).as_secs_f64()
                / median(&mut times[other].clone()).as_secs_f64();
            println!("{:44} {ratio:>26.2} × {}", "", there[other].name());
        }
    }
    if let Err(why) = &docker {
        println!("missing: docker, because {why}");
    }
    println!("missing: firecracker, because it needs KVM: see make test-engines");
    println!("{PUBLISHED}");
    Ok(())
}

/// A Docker daemon, and a bhatti daemon with a sandbox on it.
struct Docker {
    socket: String,
    image: String,
    daemon: TestDaemon,
    container: String,
}

impl Docker {
    async fn start() -> Result<Self, String> {
        let socket = std::env::var("DOCKER_SOCK").map_err(|_| "DOCKER_SOCK is not set")?;
        bhatti_docker::check(socket.as_ref()).await.map_err(|error| error.to_string())?;
        let config = format!("engine: docker\ndocker: {socket}\nnetwork: off\n");
        let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
        daemon.client.create(&named("bench")).await.map_err(|error| error.to_string())?;
        let directory = daemon.sandbox_directories().remove(0);
        let id = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let container = format!("bhatti-{id}");
        let format = ["inspect", "--format", "{{.Image}}", &container];
        let image = docker_cli(&socket, &format).await.map_err(|error| error.to_string())?;
        Ok(Self { socket, image, daemon, container })
    }

    /// Returns the duration of a `docker` command.
    async fn time(&self, arguments: &[&str]) -> Result<Duration> {
        let began = Instant::now();
        docker_cli(&self.socket, arguments).await?;
        Ok(began.elapsed())
    }
}

/// Runs a `docker` command and returns its trimmed output.
async fn docker_cli(socket: &str, arguments: &[&str]) -> Result<String> {
    let mut command = bhatti_host::process::command("docker");
    command.arg("--host").arg(format!("unix://{socket}")).args(arguments);
    let output = command.output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The systems on which the contestants run.
struct Arena<'a> {
    daemon: TestDaemon,
    docker: Option<&'a Docker>,
    engine: QemuEngine,
    template: PathBuf,
    place: tempfile::TempDir,
}

impl<'a> Arena<'a> {
    async fn start(docker: Option<&'a Docker>) -> Result<Self> {
        // As `docker run --network none`: without networks, neither side pays for one.
        let config = "network: off\n".to_owned();
        let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
        let origin = daemon.client.create(&named("bench")).await?.origin;
        let template =
            origin.strip_prefix("template ").context("not forked from a base snapshot")?;
        let template = daemon.data_dir().join("templates").join(template).canonicalize()?;
        let engine = Qemu::engine(PROGRAM.into());
        Ok(Self { daemon, docker, engine, template, place: tempfile::tempdir()? })
    }

    async fn once(&self, contestant: Contestant) -> Result<Duration> {
        match contestant {
            Contestant::HostProcess => host_process().await,
            Contestant::Exec => exec(&self.daemon, "bench").await,
            Contestant::Create => {
                // The VM of the sandbox `bench`, and a spare.
                wait_for("the spare VM", || self.daemon.all_vmm_pids().len() == 2).await;
                tokio::time::sleep(VM_PRACTISES).await;
                create(&self.daemon).await
            }
            Contestant::BareQemu => self.bare_qemu().await,
            Contestant::ContainerExec => exec(&self.docker()?.daemon, "bench").await,
            Contestant::ContainerCreate => create(&self.docker()?.daemon).await,
            Contestant::DockerExec => {
                let docker = self.docker()?;
                docker.time(&["exec", &docker.container, "true"]).await
            }
            Contestant::DockerRun => {
                let docker = self.docker()?;
                docker.time(&["run", "--rm", "--network", "none", &docker.image, "true"]).await
            }
        }
    }

    fn docker(&self) -> Result<&'a Docker> {
        self.docker.context("Docker is not available")
    }

    async fn bare_qemu(&self) -> Result<Duration> {
        bare_fork(&self.engine, &self.template, self.place.path(), None).await
    }

    async fn end(&self) -> Result<()> {
        self.daemon.client.destroy("bench").await?;
        if let Some(docker) = self.docker {
            docker.daemon.client.destroy("bench").await?;
        }
        Ok(())
    }
}

async fn host_process() -> Result<Duration> {
    let began = Instant::now();
    let status = bhatti_host::process::command("true").status().await?;
    ensure!(status.success(), "true failed");
    Ok(began.elapsed())
}

async fn exec(daemon: &TestDaemon, sandbox: &str) -> Result<Duration> {
    let began = Instant::now();
    let ran = run(&daemon.client, sandbox, &["true"]).await?;
    ensure!(ran.code == 0, "true failed");
    Ok(began.elapsed())
}

async fn create(daemon: &TestDaemon) -> Result<Duration> {
    let began = Instant::now();
    daemon.client.create(&named("new")).await?;
    exec(daemon, "new").await?;
    let took = began.elapsed();
    daemon.client.destroy("new").await?;
    Ok(took)
}
