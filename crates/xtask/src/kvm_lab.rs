//! A lab with KVM for hosts without KVM: a microVM whose emulated CPU has SVM (QEMU's TCG emulates
//! AMD's virtualization), with `/dev/kvm` inside. The lab is slow, but its KVM is real: tests that
//! need KVM run in it, and benchmarks do not.
//!
//! ```text
//!  target/kvm-lab/root-*.ext4   Debian with QEMU and the kernel's modules, made once
//!  volume0                      files that a run carries in, at the same paths as on the host
//! ```
//!
//! The lab is a guest like any other: bhatti's kernel, initramfs and agent, on bhatti's engine.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bhatti_agent::{AgentClient, ExecEvent};
use bhatti_engine::{Engine, VmSpec, VolumeFile};
use bhatti_image::{DEFAULT_IMAGE, ImageStore};
use bhatti_proto::ExecRequest;
use bhatti_qemu::{PROGRAM, Qemu, QemuEngine};
use bhatti_types::{CpuCount, MemoryMib, SandboxId};

/// Packages of the lab beyond Debian's `minbase`.
const PACKAGES: &str = "qemu-system-x86,qemu-utils,kmod,iproute2,iputils-ping,nftables,e2fsprogs,procps,util-linux,tmux,curl,python3,strace,xfsprogs";
const SUITE: &str = "bookworm";

/// Kernel modules that a host of sandboxes needs.
const MODULES: &str = "kvm-amd tun bridge veth nf_tables nft_chain_nat nft_masq nft_reject_inet nft_ct nft_limit nft_meta_bridge br_netfilter xfs";

const MEMORY_MIB: u64 = 8192;
/// One vCPU: with two, QEMU's emulation of SVM makes nested guests, and sometimes the lab itself,
/// die of triple faults.
const CPUS: u64 = 1;
/// Size of the disk with the carried files, in MiB; its file is sparse.
const CARRIED_MIB: u32 = 16384;
/// Size of the disk onto which they are copied and on which sandboxes are made, in MiB; its file is
/// sparse, too.
const SCRATCH_MIB: u32 = 32768;

/// Prefix of the names of disks with carried files; the process id of the run follows.
const CARRIED: &str = "carried-";

const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// The longest duration of a run.
const RUN_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// Runs the command of these arguments: `[--with PATH | --env NAME=VALUE]... -- COMMAND`. Returns
/// its exit code.
pub(super) fn start(arguments: &[String]) -> Result<i32> {
    let (mut carried, mut environment) = (Vec::new(), Vec::new());
    let mut rest = arguments.iter();
    while let Some(option) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{option} needs a value"));
        match option.as_str() {
            "--with" => carried.push(PathBuf::from(value()?)),
            "--env" => environment.push(value()?.clone()),
            "--" => break,
            _ => bail!("unknown option {option}"),
        }
    }
    run(&carried, &environment, &rest.cloned().collect::<Vec<_>>())
}

/// Runs `command` in the lab, with the files `carried` at the same paths as on the host. Returns
/// its exit code.
fn run(carried: &[PathBuf], environment: &[String], command: &[String]) -> Result<i32> {
    ensure!(!command.is_empty(), "no command: cargo xtask kvm-lab [--with PATH]... -- COMMAND");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let work = Path::new("target/kvm-lab");
        fs::create_dir_all(work)?;
        let work = work.canonicalize()?;
        let root = root_image(&work).await?;
        let files = carry(&work, carried).await?;
        let directory = tempfile::tempdir_in(&work)?;
        let scratch = directory.path().join("scratch");
        fs::File::create_new(&scratch)?.set_len(u64::from(SCRATCH_MIB) << 20)?;
        let id = SandboxId::from_entropy([0x1a; 8]);
        let engine = Qemu::engine(PROGRAM.into());
        let place = directory.path().join("vm");
        let ran = tokio::time::timeout(
            RUN_LIMIT,
            run_in(&engine, (id, &place), &root, [&files, &scratch], environment, command),
        )
        .await;
        engine.remove(id, &place).await?;
        fs::remove_file(files)?;
        ran.context("the run in the lab timed out")?
    })
}

async fn run_in(
    engine: &QemuEngine,
    (id, place): (SandboxId, &Path),
    root: &Path,
    disks: [&Path; 2],
    environment: &[String],
    command: &[String],
) -> Result<i32> {
    let boot = ImageStore::new(&bhatti_testkit::images().join(".."))
        .boot_files(DEFAULT_IMAGE, &bhatti_testkit::dist("lohar"))?;
    let spec = VmSpec {
        id,
        hostname: "kvm-lab".parse()?,
        cpus: CpuCount::try_from(CPUS)?,
        memory: MemoryMib::try_from(MEMORY_MIB)?,
        disk: None,
        directory: place.to_owned(),
        kernel: boot.kernel,
        initramfs: boot.initramfs,
        root_base: Some(root.to_owned()),
        tap: None,
        volumes: disks.map(volume).into(),
        awaits_root: false,
        is_builder: false,
        boot_limit: BOOT_LIMIT,
    };
    let vm = engine.boot(&spec).await?;
    let agent = AgentClient::new(vm.channel());
    let here = std::env::current_dir()?.canonicalize()?;
    // Copies the carried files to XFS with reflinks, where copies of disks share blocks as on a
    // well configured host. They lie below `/carried`, and each of its top directories is
    // bind-mounted to its path on the host.
    let prepare = format!(
        "set -e; depmod -a; for m in {MODULES}; do modprobe $m 2>/dev/null || true; done; \
         mkfs.xfs -q -m reflink=1 /dev/vdc; mkdir /carried; mount /dev/vdc /carried; mount -o ro /dev/vdb /mnt; \
         cp -a --sparse=always /mnt/. /carried; umount /mnt; cd /carried; mount -t tmpfs tmpfs /tmp; \
         find . -mindepth 1 -maxdepth 1 -not -name lost+found | while read -r top; do \
           mkdir -p \"/${{top#./}}\"; mount --bind \"$top\" \"/${{top#./}}\"; done; \
         mkdir -p '{}'; test -c /dev/kvm",
        here.display()
    );
    let ready = execute(&agent, &["sh", "-c", &prepare].map(str::to_owned), &[], "/").await?;
    ensure!(ready == 0, "the lab could not be prepared");
    let ran = execute(&agent, command, environment, &here.to_string_lossy()).await;
    // If the lab has ended, only its console says why.
    ran.with_context(|| format!("end of the lab's console:\n{}", vm.console_tail()))
}

fn volume(file: &Path) -> Option<VolumeFile> {
    Some(VolumeFile { path: file.to_owned(), read_only: false, mount: String::new() })
}

/// Runs a command as root, and copies its output to this process's. Returns its exit code.
async fn execute(
    agent: &AgentClient,
    command: &[String],
    environment: &[String],
    directory: &str,
) -> Result<i32> {
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let variables = environment.iter().filter_map(|pair| pair.split_once('='));
    let variables = variables.chain([("PATH", path), ("HOME", "/root")]);
    let request = ExecRequest {
        argv: command.to_vec(),
        user: Some("root".to_owned()),
        cwd: Some(directory.to_owned()),
        env: variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        ..ExecRequest::default()
    };
    let (_input, mut output) = agent.exec_with_input(request, Some(&[])).await?;
    loop {
        match output.next().await? {
            ExecEvent::Stdout(bytes) => std::io::stdout().write_all(&bytes)?,
            ExecEvent::Stderr(bytes) => std::io::stderr().write_all(&bytes)?,
            ExecEvent::TimedOut => bail!("the command timed out"),
            ExecEvent::Exit(code) => return Ok(code),
        }
    }
}

/// Returns the lab's root file system. It is made once for each set of packages and each kernel.
async fn root_image(work: &Path) -> Result<PathBuf> {
    let kernel = newest_kernel().await?;
    let recipe = blake3::hash(PACKAGES.as_bytes()).to_hex();
    let image = work.join(format!("root-{kernel}-{}.ext4", &recipe[..16]));
    if image.exists() {
        return Ok(image);
    }
    let scratch = tempfile::tempdir_in(work)?;
    let at = |name: &str| scratch.path().join(name).to_string_lossy().into_owned();
    println!("making the lab's root file system (only once)");
    tool("apt-get", &["download", "-qq", &kernel], scratch.path()).await?;
    let package = fs::read_dir(scratch.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension() == Some(OsStr::new("deb")))
        .context("apt-get downloaded no kernel")?;
    tool("dpkg-deb", &["-x", &package.to_string_lossy(), &at("kernel")], scratch.path()).await?;
    // Takes QEMU from backports, as a host does.
    let backports = format!(r#"--aptopt=APT::Default-Release "{SUITE}-backports""#);
    let mut arguments = vec![
        "--variant=minbase".to_owned(),
        "--format=tar".to_owned(),
        "--mode=root".to_owned(),
        backports,
        r#"--aptopt=Apt::Install-Recommends "false""#.to_owned(),
        format!("--include={PACKAGES}"),
        r#"--customize-hook=chroot "$1" useradd --create-home --uid 1000 --shell /bin/bash --user-group user"#.to_owned(),
        format!(r#"--customize-hook=cp -r {}/lib/modules "$1/usr/lib/""#, at("kernel")),
        SUITE.to_owned(),
        at("root.tar"),
    ];
    let mirror = mirror().await?;
    arguments.push(format!("deb {mirror} {SUITE} main"));
    arguments.push(format!("deb {mirror} {SUITE}-backports main"));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    tool("mmdebstrap", &arguments, scratch.path()).await?;
    fs::create_dir(scratch.path().join("root"))?;
    tool("tar", &["-C", "root", "--numeric-owner", "-xf", "root.tar"], scratch.path()).await?;
    let made = at("root.ext4");
    tool("mke2fs", &["-q", "-t", "ext4", "-d", "root", &made, "6G"], scratch.path()).await?;
    fs::rename(made, &image)?;
    Ok(image)
}

/// Makes a file system with the carried files, at the same paths as on the host.
async fn carry(work: &Path, carried: &[PathBuf]) -> Result<PathBuf> {
    remove_stale(work)?;
    let tree = tempfile::tempdir_in(work)?;
    for path in carried {
        let path =
            path.canonicalize().with_context(|| format!("failed to find {}", path.display()))?;
        let place = tree.path().join(path.strip_prefix("/")?);
        let parent = place.parent().context("a path with a parent")?;
        fs::create_dir_all(parent)?;
        let (from, to) = (path.to_string_lossy(), place.to_string_lossy());
        // Hard links where the file system allows it: the tree is only read.
        let linked = tool("cp", &["-al", &from, &to], work).await;
        if linked.is_err() {
            tool("cp", &["-a", "--sparse=always", &from, &to], work).await?;
        }
    }
    let files = work.join(format!("{CARRIED}{}.ext4", std::process::id()));
    let (from, to) = (tree.path().to_string_lossy(), files.to_string_lossy());
    let size = format!("{CARRIED_MIB}M");
    drop(fs::remove_file(&files));
    tool("mke2fs", &["-q", "-t", "ext4", "-d", &from, &to, &size], work).await?;
    Ok(files)
}

/// Removes the disks with carried files of killed runs.
fn remove_stale(work: &Path) -> Result<()> {
    for entry in fs::read_dir(work)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(CARRIED).and_then(|rest| rest.strip_suffix(".ext4"));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Returns the package of Debian's newest kernel for VMs, which bhatti uses, too.
async fn newest_kernel() -> Result<String> {
    let meta = "linux-image-cloud-amd64";
    let versions = tool("apt-cache", &["madison", meta], Path::new("/")).await?;
    let newest = versions.lines().find_map(|line| line.split('|').nth(1)).context("no kernel")?;
    let shown =
        tool("apt-cache", &["show", &format!("{meta}={}", newest.trim())], Path::new("/")).await?;
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let first = depends.split([' ', ',']).next().filter(|name| !name.is_empty());
    Ok(first.context("the kernel's package has no kernel")?.to_owned())
}

/// Returns the mirror of Debian's archive that this host uses.
async fn mirror() -> Result<String> {
    let format = "$(LABEL)|$(CODENAME)|$(REPO_URI)";
    let arguments = ["indextargets", "--format", format, "Created-By: Packages"];
    let listing = tool("apt-get", &arguments, Path::new("/")).await?;
    let prefix = format!("Debian|{SUITE}|");
    let uri = listing.lines().find_map(|line| line.strip_prefix(&prefix));
    Ok(uri.context("no mirror of Debian is configured in apt")?.to_owned())
}

async fn tool(program: &str, arguments: &[&str], directory: &Path) -> Result<String> {
    let output = bhatti_host::process::command(program)
        .args(arguments)
        .current_dir(directory)
        .output()
        .await
        .with_context(|| format!("failed to run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
