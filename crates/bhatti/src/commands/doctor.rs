//! `bhatti doctor`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bhatti_firecracker::Found;
use bhatti_host::kvm::{self, KvmUnusable};
use bhatti_host::{disk, process};
use bhatti_image::{DEFAULT_IMAGE, ImageStore};
use bhatti_net::{Host, Instance, Kept, NetError, Obstacle, PrivateNames, Upstreams, obstacles};
use bhatti_types::Report;
use serde::Serialize;

use super::{Context, engine};
use crate::config::{Config, EngineChoice};
use crate::error::CliError;
use crate::paths;

/// Disk space that a setup and a few sandboxes need, in bytes.
const COMFORTABLE_BYTES: u64 = 5 << 30;
/// Oldest major version of QEMU that the project is tested with.
const QEMU_TESTED: u32 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Good,
    Slow,
    Blocked,
    Missing,
}

/// The result of one check.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    detail: String,
    /// The command that fixes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Finding {
    fn good(what: &'static str, detail: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Good, detail: detail.into(), mend: None }
    }

    fn slow(what: &'static str, detail: impl Into<String>, mend: Option<&str>) -> Self {
        Self { what, verdict: Verdict::Slow, detail: detail.into(), mend: mend.map(str::to_owned) }
    }

    fn missing(what: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Missing, detail: detail.into(), mend: Some(mend.into()) }
    }
}

pub(crate) async fn run(context: &Context) -> Result<ExitCode, CliError> {
    let data_dir = &context.data_dir;
    let lohar = paths::lohar();
    let config = Config::read(data_dir)?;
    let mut findings = vec![accelerator(), engine(&config).await];
    if config.engine == EngineChoice::Qemu {
        findings.push(landlock(&config));
    }
    findings.extend(network().await);
    findings.extend([
        tool("mmdebstrap", "mmdebstrap").await,
        tool("mke2fs", "e2fsprogs").await,
        agent(&lohar),
        permissions(data_dir),
        space(data_dir),
        images(data_dir, lohar.ok()),
        daemon(context).await,
    ]);
    if !rustix::process::geteuid().is_root() {
        // Under these, mmdebstrap and mke2fs do without root what otherwise needs root.
        findings.push(tool("fakechroot", "fakechroot").await);
        findings.push(tool("fakeroot", "fakeroot").await);
        findings.extend(memory_access());
    }
    let healthy = findings.iter().all(|finding| finding.verdict != Verdict::Missing);
    context
        .output
        .show(&findings, |findings| findings.iter().map(describe).collect::<Vec<_>>().join("\n"))?;
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn describe(finding: &Finding) -> String {
    let mark = match finding.verdict {
        Verdict::Good => "ok",
        Verdict::Slow => "slow",
        Verdict::Blocked => "BLOCKED",
        Verdict::Missing => "MISSING",
    };
    let line = format!("{mark:8} {:12} {}", finding.what, finding.detail);
    match &finding.mend {
        Some(mend) => format!("{line}\n{:22}→ {mend}", ""),
        None => line,
    }
}

fn accelerator() -> Finding {
    match kvm::check() {
        Ok(()) => Finding::good("accelerator", "KVM works"),
        Err(error @ KvmUnusable::NoExtension) => {
            Finding::slow("accelerator", format!("software emulation (TCG): {error}"), None)
        }
        Err(error @ KvmUnusable::Device(_)) => Finding::slow(
            "accelerator",
            format!("software emulation (TCG): {}", Report(&error)),
            Some("modprobe kvm_intel || modprobe kvm_amd; usermod -aG kvm $USER"),
        ),
    }
}

/// Checks the configured engine.
async fn engine(config: &Config) -> Finding {
    match config.engine {
        EngineChoice::Qemu => qemu(&config.qemu()).await,
        EngineChoice::Firecracker => firecracker(config).await,
        EngineChoice::Docker => docker(&config.docker()).await,
    }
}

async fn docker(socket: &Path) -> Finding {
    match bhatti_docker::check(socket).await {
        Ok(found) => Finding::good(
            "docker",
            format!(
                "{}, {}: containers are less isolated than VMs",
                found.version,
                socket.display()
            ),
        ),
        Err(error) => Finding::missing(
            "docker",
            Report(&error).to_string(),
            "start Docker, or set its socket with `docker: PATH` in config.yaml",
        ),
    }
}

async fn firecracker(config: &Config) -> Finding {
    const WHAT: &str = "firecracker";
    let found = bhatti_firecracker::check(&config.firecracker(), config.jailer.as_deref()).await;
    match (found, kvm::check()) {
        (Ok(Found { program, version, jailer }), Ok(())) => {
            let jailed = jailer.map_or_else(
                || "without a jail, because the daemon is not root".to_owned(),
                |jailer| format!("jailed by {}", jailer.display()),
            );
            Finding::good(WHAT, format!("{version}, {}, {jailed}", program.display()))
        }
        (Ok(_), Err(error)) => Finding::missing(
            WHAT,
            format!("Firecracker needs KVM: {}", Report(&error)),
            "use QEMU: `engine: qemu` in config.yaml",
        ),
        (Err(error), _) => Finding::missing(WHAT, Report(&error).to_string(), engine::mend(&error)),
    }
}

async fn qemu(program: &Path) -> Finding {
    let install = "apt-get install -t bookworm-backports qemu-system-x86 qemu-utils";
    let output = match process::command(program).arg("--version").output().await {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => {
            return Finding::missing("qemu", format!("{}: {error}", program.display()), install);
        }
    };
    let first_line = output.lines().next().unwrap_or_default().to_owned();
    let version = first_line.split_whitespace().nth(3).unwrap_or_default();
    let major: u32 =
        version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or_default();
    if major >= QEMU_TESTED {
        Finding::good("qemu", first_line)
    } else {
        Finding::missing(
            "qemu",
            format!("{first_line}: too old, needs {QEMU_TESTED}.0 or later"),
            install,
        )
    }
}

/// Reports whether Landlock confines QEMU.
fn landlock(config: &Config) -> Finding {
    const WHAT: &str = "landlock";
    match process::landlock_version() {
        0 if engine::needs_landlock(config) => {
            Finding::missing(WHAT, engine::NO_LANDLOCK, engine::WITHOUT_LANDLOCK)
        }
        0 if process::is_root() => Finding::slow(WHAT, engine::NO_LANDLOCK, None),
        0 => Finding::good(
            WHAT,
            "this kernel has no Landlock, so an escaped guest could read the files of this user",
        ),
        1..6 => Finding::good(
            WHAT,
            "limits QEMU to the files of its VM; from Linux 6.12 on, it also keeps QEMU from sending signals",
        ),
        _ => Finding::good(
            WHAT,
            "limits QEMU to the files of its VM, and keeps QEMU from sending signals",
        ),
    }
}

async fn tool(program: &'static str, package: &str) -> Finding {
    match process::command(program).arg("--version").output().await {
        Ok(_) => Finding::good(program, "installed"),
        Err(error) => {
            Finding::missing(program, error.to_string(), format!("apt-get install {package}"))
        }
    }
}

/// Checks whether sandboxes can have networks. Sandboxes work without networks, too.
async fn network() -> Vec<Finding> {
    const WHAT: &str = "network";
    // No daemon has this instance number, so nothing is changed.
    match Host::open(Instance(1), Upstreams::Fixed(Vec::new()), PrivateNames::Denied).await {
        Ok(_) => {}
        Err(error) => {
            let mend = match error {
                NetError::Nft(_) => "apt-get install nftables",
                _ => "run the daemon as root, where /dev/net/tun can be opened",
            };
            let detail = format!("sandboxes cannot have networks: {}", Report(&error));
            return vec![Finding::slow(WHAT, detail, Some(mend))];
        }
    }
    let others = match obstacles().await {
        Ok(others) if others.is_empty() => {
            return vec![Finding::good(WHAT, "sandboxes can have networks")];
        }
        Ok(others) => others,
        Err(error) => {
            let detail = format!("failed to inspect other firewalls: {}", Report(&error));
            return vec![Finding::slow(WHAT, detail, None)];
        }
    };
    let blocked = |other: &Obstacle| Finding {
        what: WHAT,
        verdict: Verdict::Blocked,
        detail: other.to_string(),
        mend: Some(way_past(other)),
    };
    others.iter().map(blocked).collect()
}

/// Returns the commands that let sandboxes past another firewall's filter, until that filter is
/// recreated.
fn way_past(Obstacle { table, chain, kept }: &Obstacle) -> String {
    let rules: &[&str] = match (table.as_str(), kept) {
        ("ip filter", Kept::World) => &["-i 'bhatti+' -j ACCEPT", "-o 'bhatti+' -j ACCEPT"],
        ("ip filter", Kept::Names) => &["-i 'bhatti+' -p udp --dport 53 -j ACCEPT"],
        (_, Kept::World) => &["iifname bhatti* accept", "oifname bhatti* accept"],
        (_, Kept::Names) => &["iifname bhatti* udp dport 53 accept"],
    };
    let command = |rule: &&str| match table.as_str() {
        "ip filter" => format!("iptables -I {chain} {rule}"),
        _ => format!("nft \"insert rule {table} {chain} {rule}\""),
    };
    rules.iter().map(command).collect::<Vec<_>>().join("; ")
}

fn agent(lohar: &Result<PathBuf, CliError>) -> Finding {
    match lohar {
        Ok(path) => Finding::good("guest agent", path.display().to_string()),
        Err(error) => Finding::missing("guest agent", error.message.clone(), "make build"),
    }
}

/// Returns the nearest directory that exists, of the path and its ancestors.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("/"))
}

fn permissions(data_dir: &Path) -> Finding {
    let directory = existing(data_dir);
    let detail = data_dir.display().to_string();
    match rustix::fs::access(directory, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
    {
        Ok(()) => Finding::good("data dir", detail),
        Err(error) => Finding::missing(
            "data dir",
            format!("{}: {}", directory.display(), std::io::Error::from(error)),
            format!("run as the owner of {detail}, or choose another directory with --data-dir"),
        ),
    }
}

fn space(data_dir: &Path) -> Finding {
    match disk::free_bytes(existing(data_dir)) {
        Ok(free) if free >= COMFORTABLE_BYTES => {
            Finding::good("disk space", format!("{} GiB free", free >> 30))
        }
        Ok(free) => Finding::missing(
            "disk space",
            format!("{} MiB free, {} GiB recommended", free >> 20, COMFORTABLE_BYTES >> 30),
            "free disk space, or choose another directory with --data-dir",
        ),
        Err(error) => Finding::missing("disk space", error.to_string(), "check the file system"),
    }
}

fn images(data_dir: &Path, lohar: Option<PathBuf>) -> Finding {
    let store = ImageStore::new(data_dir);
    match lohar.map(|lohar| store.boot_files(DEFAULT_IMAGE, &lohar)) {
        Some(Ok(files)) => Finding::good("images", files.root.display().to_string()),
        Some(Err(error)) => Finding::missing("images", Report(&error).to_string(), "bhatti setup"),
        None => Finding::missing("images", "not checked without the guest agent", "make build"),
    }
}

/// Checks whether the daemon can access the memory of VMMs, as snapshots need. By default, Yama
/// allows that only to root.
fn memory_access() -> Option<Finding> {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?;
    let restricted = scope.trim() != "0";
    restricted.then(|| {
        Finding::missing(
            "snapshots",
            "this kernel does not let users access the memory of their own processes (ptrace_scope)",
            "sudo sysctl kernel.yama.ptrace_scope=0, or run the daemon as root",
        )
    })
}

async fn daemon(context: &Context) -> Finding {
    match context.client.health().await {
        Ok(health) => Finding::good("daemon", format!("{} for {}", health.status, health.uptime)),
        Err(error) => Finding::slow("daemon", Report(&error).to_string(), Some("bhatti serve")),
    }
}
