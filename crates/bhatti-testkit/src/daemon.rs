//! The daemon of a test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use bhatti_client::Client;
use tempfile::TempDir;
use tokio::process::Child;
use tokio::time::{sleep, timeout};

use crate::tool::std_command;
use crate::{dist, enter_own_network, images, templates};

/// How a test's daemon is started.
#[derive(Clone, Debug)]
pub struct Serve {
    /// The configuration file's text.
    pub config: String,
    /// The daemon's program; `dist/bhatti` by default.
    pub program: PathBuf,
    /// The directory of images; `None` for a daemon without images.
    pub images: Option<PathBuf>,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// The fault that is injected.
    pub fault: Option<Fault>,
}

/// A fault in a daemon. See [`fault!`](crate::fault).
#[derive(Clone, Debug)]
pub struct Fault {
    /// The program `bhatti` with the feature `faults`, which the shipped one lacks.
    pub program: PathBuf,
    /// The process that dies, and the step at which it dies: `daemon:STEP` or `vmm:STEP`, with the
    /// steps of `bhatti_node`.
    pub step: String,
}

/// Returns the fault at a step, for [`Serve::fault`]. Only tests of the package `bhatti` have the
/// program for it.
#[macro_export]
macro_rules! fault {
    ($step:expr) => {
        Some($crate::Fault {
            program: env!("CARGO_BIN_EXE_bhatti").into(),
            step: $step.to_string(),
        })
    };
}

impl Default for Serve {
    fn default() -> Self {
        Self {
            config: String::new(),
            program: dist("bhatti"),
            images: Some(images()),
            arguments: Vec::new(),
            fault: None,
        }
    }
}

/// Environment variable with further lines of every test's configuration, separated by commas, for
/// example `engine: firecracker`.
const COMMON_CONFIG: &str = "BHATTI_TEST_CONFIG";

impl Serve {
    /// Returns the test's own lines and the lines that all tests share. Allows a kernel without
    /// Landlock, unless a line decides that.
    fn whole_config(&self) -> String {
        let config = format!("{}{}", self.config, common_config());
        let key = "allow_without_landlock";
        if bhatti_host::process::landlock_version() == 0 && !config.contains(key) {
            return format!("{config}{key}: true\n");
        }
        config
    }
}

/// Returns the value of `key` in the configuration that all tests share.
pub(crate) fn common_value(key: &str) -> Option<String> {
    value(&common_config(), key)
}

fn value(config: &str, key: &str) -> Option<String> {
    let values = config.lines().filter_map(|line| line.split_once(": "));
    values.filter(|(name, _)| *name == key).map(|(_, value)| value.trim().to_owned()).next_back()
}

fn common_config() -> String {
    let lines = std::env::var(COMMON_CONFIG).unwrap_or_default();
    lines.split(',').map(|line| format!("{}\n", line.trim())).collect()
}

/// A running daemon. Dropping this value ends the daemon and its sandboxes.
pub struct TestDaemon {
    serve: Serve,
    data: TempDir,
    /// The programs of a daemon with a fault.
    programs: TempDir,
    process: Option<Child>,
    /// Calls the daemon as its admin.
    pub client: Client,
}

impl TestDaemon {
    /// Starts a daemon with the shared images.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not start.
    pub async fn start() -> Self {
        Self::start_with(Serve::default()).await
    }

    /// Starts a daemon as `serve` says, in a new network namespace. The calling thread stays in
    /// that namespace.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not start.
    pub async fn start_with(serve: Serve) -> Self {
        enter_own_network();
        let data = tempfile::Builder::new()
            .prefix("bhatti-test-")
            .tempdir()
            .expect("a directory can be made");
        if let Some(images) = &serve.images {
            // Base snapshots are shared, too: they are made once and never changed.
            for (there, name) in [(images.clone(), "images"), (templates(), "templates")] {
                std::os::unix::fs::symlink(there, data.path().join(name))
                    .expect("a link can be made");
            }
        }
        fs::write(data.path().join("config.yaml"), serve.whole_config())
            .expect("a file can be written");
        let client = Client::unix(data.path());
        let programs = tempfile::tempdir().expect("a directory can be made");
        let mut daemon = Self { serve, data, programs, process: None, client };
        daemon.serve().await;
        daemon
    }

    /// Returns the daemon's data directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        self.data.path()
    }

    /// Returns the daemon's process id.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.as_ref().and_then(Child::id).expect("the daemon runs")
    }

    /// Kills the daemon with SIGKILL. Its sandboxes keep running.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not run.
    pub async fn kill(&mut self) {
        self.process.take().expect("the daemon runs").kill().await.expect("a child can be killed");
    }

    /// Waits until the daemon ends by itself. Returns whether its exit status is success.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not end.
    pub async fn ended(&mut self) -> bool {
        let mut process = self.process.take().expect("the daemon runs");
        let ended = timeout(crate::LIMIT, process.wait()).await;
        ended.expect("the daemon ends").expect("a child can be waited for").success()
    }

    /// Stops the daemon with SIGTERM, as an administrator would, and waits for its end.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not end, or does not end cleanly.
    pub async fn terminate(&mut self) {
        let terminated = std_command("kill", &[&self.pid().to_string()]);
        assert!(terminated, "the daemon does not run");
        assert!(self.ended().await, "the daemon did not end cleanly after SIGTERM");
    }

    /// Changes how the daemon is started, and starts it on the same data directory.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not start.
    pub async fn serve_with(&mut self, change: impl FnOnce(&mut Serve)) {
        change(&mut self.serve);
        self.serve().await;
    }

    /// Starts the daemon on the same data directory, and waits until it has adopted its sandboxes.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not start.
    pub async fn serve(&mut self) {
        self.listen().await;
        // The states that a test reads next are then those that the daemon has found.
        let taken_up = async {
            while self.client.health().await.map_or(true, |health| health.taking_up > 0) {
                sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        timeout(crate::LIMIT, taken_up).await.expect("the daemon adopts its sandboxes");
    }

    /// Starts the daemon on the same data directory, and waits until it answers. It may not have
    /// adopted its sandboxes yet.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not start.
    pub async fn listen(&mut self) {
        let log = self.data.path().join("serve.log");
        let output =
            File::options().create(true).append(true).open(&log).expect("the log can be written");
        let program = match &self.serve.fault {
            Some(fault) => self.beside_the_agent(&fault.program),
            None => self.serve.program.clone(),
        };
        let mut command = bhatti_host::process::command(program);
        command.arg("serve").args(&self.serve.arguments).arg("--data-dir").arg(self.data.path());
        command.envs(self.serve.fault.iter().map(|fault| ("BHATTI_TEST_FAULT", &fault.step)));
        command.stdout(Stdio::null()).stderr(output);
        self.process = Some(command.spawn().expect("the daemon can be started"));
        // A connection proves nothing: while a child of a killed daemon holds the socket, the
        // kernel still accepts connections to it.
        let answers = async {
            while self.client.health().await.is_err() {
                sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        timeout(crate::LIMIT, answers).await.expect("the daemon answers");
    }

    /// Returns a copy of a daemon's program that has the guest agent beside it.
    fn beside_the_agent(&self, program: &Path) -> PathBuf {
        let directory = self.programs.path();
        for (from, name) in [(program, "bhatti"), (&dist("lohar"), "lohar")] {
            let to = directory.join(name);
            if !to.exists() {
                let copied = fs::copy(from, to);
                copied.unwrap_or_else(|error| panic!("{} is not copied: {error}", from.display()));
            }
        }
        directory.join("bhatti")
    }

    /// Returns the address that the daemon has logged with `message`.
    ///
    /// # Panics
    ///
    /// Panics if the daemon has logged none.
    #[must_use]
    pub fn address(&self, message: &str) -> std::net::SocketAddr {
        let log = self.log();
        let line = log.lines().rev().find(|line| line.contains(message));
        let address = line.and_then(|line| line.rsplit("address=").next());
        address.and_then(|address| address.trim().parse().ok()).expect("the address is logged")
    }

    /// Returns the address of the API on TCP. The configuration must have `listen`.
    #[must_use]
    pub fn api_address(&self) -> std::net::SocketAddr {
        self.address("Listening for callers with an API key")
    }

    /// Returns the address of published ports. The configuration must have `public_listen`.
    #[must_use]
    pub fn public_address(&self) -> std::net::SocketAddr {
        self.address("Listening for requests to published ports")
    }

    /// Returns the daemon's log so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.data.path().join("serve.log")).unwrap_or_default()
    }

    /// Returns a command that runs the CLI with `arguments` on this daemon.
    #[must_use]
    pub fn cli(&self, arguments: &[&str]) -> tokio::process::Command {
        let program = match &self.serve.fault {
            Some(fault) => self.beside_the_agent(&fault.program),
            None => self.serve.program.clone(),
        };
        let mut command = bhatti_host::process::command(program);
        command.args(["--data-dir".as_ref(), self.data.path().as_os_str()]).args(arguments);
        command
    }

    /// Lists the directories of the daemon's sandboxes, without those of spares.
    #[must_use]
    pub fn sandbox_directories(&self) -> Vec<PathBuf> {
        let all = fs::read_dir(self.data.path().join("sandboxes")).into_iter().flatten().flatten();
        all.map(|entry| entry.path()).filter(|path| !path.join("spare").exists()).collect()
    }

    /// Lists the VMM processes of the daemon's sandboxes.
    #[must_use]
    pub fn vmm_pids(&self) -> Vec<u32> {
        self.sandbox_directories().iter().filter_map(|directory| vmm_pid(directory)).collect()
    }

    /// Lists all VMM processes of the daemon, including spares and those without a record.
    #[must_use]
    pub fn all_vmm_pids(&self) -> Vec<u32> {
        let directory = self.data.path().to_string_lossy().into_owned();
        let containers = self.containers();
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_ours = |pid: &u32| {
            let command_line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command_line = String::from_utf8_lossy(&command_line);
            // QEMU names its files in its command line; Firecracker runs in its directory, or has
            // it as its root.
            let runs_there = fs::read_link(format!("/proc/{pid}/cwd"))
                .is_ok_and(|place| place.starts_with(self.data.path()));
            runs_there
                || self.is_root_of(*pid)
                || command_line.starts_with("qemu-system") && command_line.contains(&directory)
                || containers.iter().any(|name| command_line == format!("/run/lohar\0{name}\0"))
        };
        pids.filter(is_ours).collect()
    }

    /// Whether the root directory of a process lies in the data directory.
    fn is_root_of(&self, pid: u32) -> bool {
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        let name = self.data.path().file_name().unwrap_or_default().to_string_lossy();
        // The fourth field is the mounted directory within its file system, the fifth the mount
        // point.
        mounts.lines().any(|line| {
            let mut fields = line.split(' ').skip(3);
            let (what, place) = (fields.next().unwrap_or_default(), fields.next());
            place == Some("/") && what.split('/').any(|part| part == name)
        })
    }

    /// Returns the names that the containers of the daemon's sandboxes have, with Docker.
    fn containers(&self) -> Vec<String> {
        let name = |directory: &PathBuf| {
            Some(format!("bhatti-{}", directory.file_name()?.to_string_lossy()))
        };
        self.sandbox_directories().iter().filter_map(name).collect()
    }

    /// Removes the containers of the daemon's sandboxes without telling the daemon.
    pub fn remove_containers(&self) {
        let Some(socket) = value(&self.serve.whole_config(), "docker") else { return };
        let socket = format!("unix://{socket}");
        for name in self.containers() {
            std_command("docker", &["--host", &socket, "rm", "--force", &name]);
        }
    }

    /// Prints the logs of the daemon and its VMMs.
    #[expect(clippy::print_stderr, reason = "a failed test prints the logs")]
    fn tell(&self) {
        eprintln!("--- the daemon's log:\n{}---", self.log());
        for directory in self.sandbox_directories() {
            // With QEMU, the log is a pipe that the daemon reads.
            let log = directory.join("vmm.log");
            let text = log.is_file().then(|| fs::read_to_string(log).ok()).flatten();
            let text = text.unwrap_or_default();
            let pid = vmm_pid(&directory);
            eprintln!("--- {}, process {pid:?}:\n{text}---", directory.display());
        }
    }

    /// Removes the control groups of killed VMs. A VM that is still ending keeps its group, so the
    /// removal is repeated for up to a second.
    fn remove_groups(&self) {
        for directory in self.sandbox_directories() {
            let id = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            for tree in ["", "memory", "pids"] {
                let group =
                    Path::new("/sys/fs/cgroup").join(tree).join(format!("bhatti/bhatti-{id}"));
                for _ in 0..200 {
                    if fs::remove_dir(&group).map_or_else(
                        |error| error.kind() == std::io::ErrorKind::NotFound,
                        |()| true,
                    ) {
                        break;
                    }
                    std::thread::park_timeout(std::time::Duration::from_millis(5));
                }
            }
        }
    }

    fn unmount_volumes(&self) {
        for directory in self.sandbox_directories() {
            for mount in fs::read_dir(directory.join("mounts")).into_iter().flatten().flatten() {
                std_command("umount", &[&mount.path().to_string_lossy()]);
            }
        }
    }
}

/// Kills the VMM of a VM that a test has started without a daemon, if the VMM still runs.
pub fn kill_vmm(directory: &Path, id: &str) {
    if let Some(pid) = vmm_pid_of(directory, id) {
        std_command("kill", &["-9", &pid.to_string()]);
    }
}

/// Returns the process of a sandbox: the recorded VMM, if that process still belongs to the
/// sandbox, or the first process of its container.
#[must_use]
pub fn vmm_pid(directory: &Path) -> Option<u32> {
    let id = directory.file_name()?.to_str()?;
    vmm_pid_of(directory, id).or_else(|| container_pid(id))
}

fn container_pid(id: &str) -> Option<u32> {
    let wanted = format!("/run/lohar\0bhatti-{id}\0");
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == wanted.as_bytes())
    })
}

/// Returns the process that a VM's directory records, if its command line still contains `name`.
#[must_use]
pub fn vmm_pid_of(directory: &Path, name: &str) -> Option<u32> {
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(directory.join("vm.json")).ok()?).ok()?;
    let pid = u32::try_from(record["pid"].as_u64()?).ok()?;
    let command_line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    String::from_utf8_lossy(&command_line).contains(name).then_some(pid)
}

/// Kills a process with SIGKILL.
///
/// # Panics
///
/// Panics if there is no such process.
pub fn kill_process(pid: u32) {
    let status = std_command("kill", &["-9", &pid.to_string()]);
    assert!(status, "process {pid} could not be killed");
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The daemon logs why a VM has ended a moment after a test may see its end.
            std_command("sleep", &["1"]);
            self.tell();
        }
        // Dropping the process kills the daemon first, so it cannot mark its VMs as failed.
        drop(self.process.take());
        for pid in self.all_vmm_pids() {
            std_command("kill", &["-9", &pid.to_string()]);
        }
        self.remove_containers();
        self.unmount_volumes();
        self.remove_groups();
    }
}
