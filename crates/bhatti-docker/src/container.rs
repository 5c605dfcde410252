//! Requests to Docker about containers.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bhatti_engine::{BootError, VmSpec};
use bhatti_host::blocking;
use bhatti_host::process::Followed;
use bhatti_types::{DiskMib, SandboxId};
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, HostConfig, HostConfigLogConfig, Mount,
    MountType,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, InspectContainerOptions, KillContainerOptions,
    RemoveContainerOptionsBuilder, StartContainerOptions, WaitContainerOptions,
};
use futures_util::TryStreamExt;
use tokio::time::timeout;
use tracing::warn;

use crate::channel;
use crate::io_error;
use crate::mounts;
use crate::root::NOT_FOUND;

/// Paths in the container: the guest agent's program, and the directory shared with the host.
const AGENT: &str = "/run/lohar";
const SHARED: &str = "/run/bhatti";

/// The label with the name of the host's end of the network card.
const TAP: &str = "bhatti.tap";

/// The capabilities that containers keep: those for users, files, signals, low ports and chroot.
/// The guest agent needs `SETPCAP` to take `NET_ADMIN` from the processes that it starts.
const CAPABILITIES: [&str; 10] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// The capability that a builder needs in addition: without it, the kernel does not let a user
/// namespace contain root (user_namespaces(7)). Docker gives it to containers by default.
const BUILDER_CAPABILITY: &str = "SETFCAP";

/// The seccomp filter of a builder. It allows user and mount namespaces, which Docker's filter
/// refuses. It refuses network namespaces, whose owner could configure the kernel's packet filters,
/// and the calls that Docker's filter refuses because of their risk.
const BUILDER_SECCOMP: &str = include_str!("builder_seccomp.json");

/// The most processes and threads of a sandbox.
const PIDS_MAX: i64 = 8192;

/// The scheduler period of the CPU quota, in microseconds.
const CPU_PERIOD_US: i64 = 100_000;

/// How long a killed container may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The option that Docker's error names if Docker cannot limit a container's disk. Docker can with
/// overlay2 on XFS with project quotas, with btrfs and with ZFS.
const STORAGE_OPTION: &str = "storage-opt";
/// Whether Docker has refused such a limit.
static DISK_IS_UNLIMITED: AtomicBool = AtomicBool::new(false);

/// Statuses of requests for a state that the container already has.
const NOT_MODIFIED: u16 = 304;
const CONFLICT: u16 = 409;

/// The state of a container as Docker reports it.
pub(crate) struct Found {
    /// The process id of its first process on this host; 0 if the container does not run.
    pid: u32,
    /// Whether the container runs, paused or not.
    pub(crate) runs: bool,
    pub(crate) is_paused: bool,
    tap: Option<String>,
}

/// Returns the name of a sandbox's container.
pub(crate) fn name(id: SandboxId) -> String {
    format!("bhatti-{id}")
}

/// Looks for the container of a sandbox.
pub(crate) async fn find(docker: &Docker, id: SandboxId) -> io::Result<Option<Found>> {
    match docker.inspect_container(&name(id), None::<InspectContainerOptions>).await {
        Ok(container) => Ok(Some(found(container))),
        Err(Error::DockerResponseServerError { status_code: NOT_FOUND, .. }) => Ok(None),
        Err(error) => Err(io_error(error)),
    }
}

fn found(container: ContainerInspectResponse) -> Found {
    let state = container.state.unwrap_or_default();
    let labels = container.config.and_then(|config| config.labels).unwrap_or_default();
    Found {
        pid: state.pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0),
        runs: state.running.unwrap_or(false),
        is_paused: state.paused.unwrap_or(false),
        tap: labels.get(TAP).cloned(),
    }
}

/// Creates the container of a sandbox.
///
/// # Errors
///
/// Returns [`BootError::NoDiskSize`] if the request sets a disk size that Docker cannot limit.
pub(crate) async fn create(
    docker: &Docker,
    spec: &VmSpec,
    root_base: &Path,
    image: String,
    lohar: &Path,
) -> Result<(), BootError> {
    let failed = |source| BootError::Prepare { step: "create the container", source };
    let create = async |body| {
        let options = CreateContainerOptionsBuilder::new().name(&name(spec.id)).build();
        docker.create_container(Some(options), body).await.map(drop)
    };
    let mut body = body(spec, image, lohar);
    if !DISK_IS_UNLIMITED.load(Ordering::Relaxed) {
        let image_bytes = blocking(|| fs::metadata(root_base)).map_err(failed)?.len();
        let bytes = spec.disk.map_or(image_bytes, DiskMib::bytes);
        let limit = HashMap::from([("size".to_owned(), bytes.to_string())]);
        body.host_config.get_or_insert_default().storage_opt = Some(limit);
        match create(body.clone()).await {
            Err(Error::DockerResponseServerError { message, .. })
                if message.contains(STORAGE_OPTION) =>
            {
                warn!(
                    reason = message,
                    "Docker cannot limit container disks here: a sandbox can fill Docker's data directory"
                );
                DISK_IS_UNLIMITED.store(true, Ordering::Relaxed);
                body.host_config.get_or_insert_default().storage_opt = None;
            }
            created => return created.map_err(io_error).map_err(failed),
        }
    }
    if spec.disk.is_some() {
        return Err(BootError::NoDiskSize(
            "Docker cannot limit the size of a container's disk here",
        ));
    }
    create(body).await.map_err(io_error).map_err(failed)
}

fn body(spec: &VmSpec, image: String, lohar: &Path) -> ContainerCreateBody {
    let labels = spec.tap.iter().map(|tap| (TAP.to_owned(), tap.clone())).collect();
    ContainerCreateBody {
        image: Some(image),
        hostname: Some(spec.hostname.to_string()),
        // The argument identifies the sandbox in the process's command line.
        entrypoint: Some(vec![AGENT.to_owned(), name(spec.id)]),
        env: Some(vec!["LOHAR_CONTAINER=1".to_owned()]),
        user: Some("0:0".to_owned()),
        working_dir: Some("/".to_owned()),
        labels: Some(labels),
        host_config: Some(host_config(spec, lohar)),
        ..ContainerCreateBody::default()
    }
}

fn host_config(spec: &VmSpec, lohar: &Path) -> HostConfig {
    let memory = i64::from(spec.memory.get()) << 20;
    let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    let log = [("max-size", "1m"), ("max-file", "1")];
    let tmpfs =
        [("/run", "rw,exec,nosuid,nodev,mode=0755"), ("/tmp", "rw,exec,nosuid,nodev,mode=1777")];
    let mut capabilities = texts(&CAPABILITIES);
    if spec.tap.is_some() {
        capabilities.push("NET_ADMIN".to_owned());
    }
    let mut security = texts(&["no-new-privileges"]);
    if spec.is_builder {
        capabilities.push(BUILDER_CAPABILITY.to_owned());
        // Docker's AppArmor profile refuses every mount.
        security.push("apparmor=unconfined".to_owned());
        security.push(format!("seccomp={BUILDER_SECCOMP}"));
    }
    HostConfig {
        memory: Some(memory),
        // The limit of memory plus swap, so the container gets no swap.
        memory_swap: Some(memory),
        cpu_period: Some(CPU_PERIOD_US),
        cpu_quota: Some(CPU_PERIOD_US * i64::from(spec.cpus.get())),
        pids_limit: Some(PIDS_MAX),
        shm_size: Some(memory / 2),
        tmpfs: Some(pairs(&tmpfs)),
        mounts: Some(binds(spec, lohar)),
        network_mode: Some("none".to_owned()),
        sysctls: Some(pairs(sysctls())),
        privileged: Some(false),
        cap_drop: Some(texts(&["ALL"])),
        cap_add: Some(capabilities),
        security_opt: Some(security),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".to_owned()),
            config: Some(pairs(&log)),
        }),
        ..HostConfig::default()
    }
}

/// Disables IPv6, because the network is IPv4 only. A host without IPv6 has no such settings.
fn sysctls() -> &'static [(&'static str, &'static str)] {
    if Path::new("/proc/sys/net/ipv6").exists() {
        &[("net.ipv6.conf.all.disable_ipv6", "1"), ("net.ipv6.conf.default.disable_ipv6", "1")]
    } else {
        &[]
    }
}

fn pairs(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn binds(spec: &VmSpec, lohar: &Path) -> Vec<Mount> {
    let bind = |from: &Path, to: &str, read_only| Mount {
        typ: Some(MountType::BIND),
        source: Some(from.to_string_lossy().into_owned()),
        target: Some(to.to_owned()),
        read_only: Some(read_only),
        ..Mount::default()
    };
    let mut binds = vec![
        bind(&spec.directory.join(channel::DIRECTORY), SHARED, false),
        bind(lohar, AGENT, true),
    ];
    for volume in mounts::places(&spec.directory, &spec.volumes) {
        binds.push(bind(&volume.here, &volume.there, volume.read_only));
    }
    binds
}

/// Starts the container of a sandbox.
pub(crate) async fn start(docker: &Docker, id: SandboxId) -> io::Result<()> {
    let started = docker.start_container(&name(id), None::<StartContainerOptions>).await;
    started.or_else(|error| nothing_to_do(error, NOT_MODIFIED)).map_err(io_error)
}

/// Returns the first process of a sandbox's container, if the container runs.
pub(crate) async fn follow(docker: &Docker, id: SandboxId) -> io::Result<Option<Followed>> {
    let Some(pid) = running_pid(docker, id).await? else { return Ok(None) };
    let process = match Followed::of(pid) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        process => process?,
    };
    // Asks again: the process may have ended in between, and its id may have been reused.
    let is_it = running_pid(docker, id).await? == Some(pid);
    Ok(is_it.then_some(process))
}

async fn running_pid(docker: &Docker, id: SandboxId) -> io::Result<Option<u32>> {
    let container = find(docker, id).await?.filter(|container| container.runs);
    Ok(container.map(|container| container.pid))
}

/// Kills the container of a sandbox, if it runs. Returns the name of the host's end of its network
/// card.
pub(crate) async fn kill(docker: &Docker, id: SandboxId) -> io::Result<Option<String>> {
    let Some(container) = find(docker, id).await? else { return Ok(None) };
    if container.runs {
        let name = name(id);
        let killed = docker.kill_container(&name, None::<KillContainerOptions>).await;
        killed.or_else(|error| nothing_to_do(error, CONFLICT)).map_err(io_error)?;
        // The response has the process's exit code, and bollard treats a code other than 0 as an
        // error.
        let ended = docker.wait_container(&name, None::<WaitContainerOptions>);
        let ended: Result<Vec<_>, _> = timeout(KILL_LIMIT, ended.try_collect())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the container did not end"))?;
        match ended {
            Ok(_) | Err(Error::DockerContainerWaitError { .. }) => {}
            Err(error) => nothing_to_do(error, NOT_FOUND).map_err(io_error)?,
        }
    }
    Ok(container.tap)
}

/// Removes the container of a sandbox with its disk.
pub(crate) async fn remove(docker: &Docker, id: SandboxId) -> io::Result<()> {
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    let removed = docker.remove_container(&name(id), Some(options)).await;
    removed.or_else(|error| nothing_to_do(error, NOT_FOUND)).map_err(io_error)
}

/// Ignores an error response with this status.
fn nothing_to_do(error: Error, status: u16) -> Result<(), Error> {
    match error {
        Error::DockerResponseServerError { status_code, .. } if status_code == status => Ok(()),
        error => Err(error),
    }
}
