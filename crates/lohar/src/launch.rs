//! Starts processes: as the right user, with the right environment, in the right place.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bhatti_proto::{AgentError, ErrorKind, ExecRequest};
use rustix::fs::{Gid, Mode, OFlags, fchown, open};
use rustix::io::write;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{ioctl_tiocsctty, setpgid, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{
    CapabilitySet, remove_capability_from_bounding_set, set_thread_gid, set_thread_groups,
    set_thread_uid,
};
use tokio::net::unix::pipe;

use crate::Agent;
use crate::descriptors::lower_limit;
use crate::log::errno_text;
use crate::lookup::{LookupError, find_program};
use crate::processes::{Cgroup, Confinement, Processes};
use crate::reaper::Exit;
use crate::refusal::refused;
use crate::spawn::Program;
use crate::surroundings::Surroundings;
use crate::user::{self, User};

/// The `PATH` of commands, unless the image, the settings or the request have another.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process with pipes.
pub(crate) struct Piped {
    pub(crate) processes: Rc<Processes>,
    pub(crate) exit: Exit,
    pub(crate) stdin: pipe::Sender,
    pub(crate) stdout: pipe::Receiver,
    pub(crate) stderr: pipe::Receiver,
}

/// A process on a terminal.
pub(crate) struct OnTerminal {
    pub(crate) processes: Rc<Processes>,
    pub(crate) exit: Exit,
    /// The terminal's master end, non-blocking.
    pub(crate) master: OwnedFd,
}

/// Starts the command of `request` with pipes.
pub(crate) fn piped(
    agent: &Agent,
    request: &ExecRequest,
    confinement: Confinement,
) -> Result<Piped, AgentError> {
    let command = Command::find(agent, request)?;
    let new = || {
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| spawn_failed(&command.file, &error.into()))
    };
    let ((stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr)) =
        (new()?, new()?, new()?);
    let stdio = [&stdin, &stdout, &stderr].map(AsFd::as_fd);
    let (processes, exit) = command.start(agent, stdio, Attachment::Pipes, confinement)?;
    let pipes = |error: io::Error| other(format!("start: {}", errno_text(&error)));
    Ok(Piped {
        processes,
        exit,
        stdin: pipe::Sender::from_owned_fd(to_stdin).map_err(pipes)?,
        stdout: pipe::Receiver::from_owned_fd(from_stdout).map_err(pipes)?,
        stderr: pipe::Receiver::from_owned_fd(from_stderr).map_err(pipes)?,
    })
}

/// Starts the command of `request` on a terminal of its own.
pub(crate) fn on_terminal(agent: &Agent, request: &ExecRequest) -> Result<OnTerminal, AgentError> {
    let command = Command::find(agent, request)?;
    let (master, slave) = open_terminal(request.rows.unwrap_or(24), request.cols.unwrap_or(80))
        .map_err(|error| other(format!("pty: {}", errno_text(&error))))?;
    if let Some(user) = &command.user {
        // Programs open their terminal by its name, too: screen, and gpg for a passphrase.
        let owned = fchown(&slave, Some(user.uid), Some(Gid::from_raw(TTY_GID)));
        owned.map_err(|error| other(format!("pty: {}", errno_text(&error.into()))))?;
    }
    let stdio = [slave.as_fd(); 3];
    let (processes, exit) = command.start(agent, stdio, Attachment::Terminal, Confinement::Own)?;
    Ok(OnTerminal { processes, exit, master })
}

/// The group `tty`, which may write to terminals: `gid=5` of devpts.
const TTY_GID: u32 = 5;

fn open_terminal(rows: u16, cols: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let slave = open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    set_size(&master, rows, cols)?;
    rustix::io::ioctl_fionbio(&master, true)?;
    Ok((master, slave))
}

/// Sets the size of a terminal.
pub(crate) fn set_size(master: impl AsFd, rows: u16, cols: u16) -> io::Result<()> {
    Ok(tcsetwinsize(master, Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 })?)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Attachment {
    Pipes,
    Terminal,
}

/// A command that can be started.
struct Command {
    file: PathBuf,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
    directory: Option<PathBuf>,
    user: Option<User>,
}

impl Command {
    fn find(agent: &Agent, request: &ExecRequest) -> Result<Self, AgentError> {
        let user = user::acting(agent, request.user.as_deref())?;
        let environment = environment(agent, user.as_ref(), &request.env);
        let path = environment.get("PATH").map_or("", String::as_str);
        let usual = agent.settings.borrow().workdir.clone();
        let named = request.cwd.as_deref().filter(|cwd| !cwd.is_empty());
        let directory = if request.at_home {
            let home = user.as_ref().map_or("/root", |user| &user.home);
            Some(directory_at_home(named, usual.as_deref(), Path::new(home))?)
        } else {
            working_directory(named.or(usual.as_deref()))?
        };
        let name = request.argv.first().map_or("", String::as_str);
        let found = find_program(name, path, directory.as_deref().unwrap_or(Path::new("")));
        let file = found.map_err(|error| lookup_failed(name, &error))?;
        // If a shell has to run the file, it takes a name with a slash for a path, regardless of
        // its first letter.
        let is_bare = file.components().count() == 1;
        let file = if is_bare { Path::new(".").join(file) } else { file };
        Ok(Self { file, arguments: request.argv.clone(), environment, directory, user })
    }

    fn start(
        &self,
        agent: &Agent,
        stdio: [BorrowedFd<'_>; 3],
        attachment: Attachment,
        confinement: Confinement,
    ) -> Result<(Rc<Processes>, Exit), AgentError> {
        let no_cgroup = |error: io::Error| other(format!("start: cgroup: {}", errno_text(&error)));
        let cgroup = agent.cgroups.open(agent.place, confinement).map_err(no_cgroup)?;
        let procs = cgroup.as_ref().map(Cgroup::procs).transpose().map_err(no_cgroup)?;
        let in_container = agent.place == Surroundings::Container;
        let settle = || {
            if in_container {
                // First: only root can drop these capabilities.
                give_capabilities_up()?;
            }
            settle(attachment, self.user.as_ref(), procs.as_ref())?;
            // Last: the agent's descriptors are open until the child executes its program, and
            // may be more than the child's limit allows.
            lower_limit(agent.child_descriptors)
        };
        let started = self.program(stdio).and_then(|program| program.start(&settle));
        let group = started.map_err(|error| spawn_failed(&self.file, &error))?;
        Ok((Rc::new(Processes::new(group, cgroup)), agent.reaper.watch(group)))
    }

    /// # Errors
    ///
    /// Returns an error if a part of the command contains a zero byte.
    fn program<'a>(&self, stdio: [BorrowedFd<'a>; 3]) -> io::Result<Program<'a>> {
        let arguments = self.arguments.iter().map(|argument| CString::new(argument.as_str()));
        let pair = |(name, value)| CString::new(format!("{name}={value}"));
        let of_path = |path: &PathBuf| CString::new(path.as_os_str().as_bytes());
        Ok(Program {
            file: of_path(&self.file)?,
            arguments: arguments.collect::<Result<_, _>>()?,
            environment: self.environment.iter().map(pair).collect::<Result<_, _>>()?,
            directory: self.directory.as_ref().map(of_path).transpose()?,
            stdio,
        })
    }
}

/// Runs in the child: sets its cgroup, its process group or terminal session, and its user.
fn settle(attachment: Attachment, user: Option<&User>, procs: Option<&File>) -> io::Result<()> {
    if let Some(procs) = procs {
        // The process that writes `0` is moved.
        write(procs, b"0")?;
    }
    match attachment {
        Attachment::Pipes => setpgid(None, None)?,
        Attachment::Terminal => {
            setsid()?;
            ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
    }
    if let Some(user) = user {
        set_thread_groups(&user.groups)?;
        set_thread_gid(user.gid)?;
        set_thread_uid(user.uid)?;
    }
    Ok(())
}

/// Drops the capabilities that the agent needs to set up a container's network: root in a sandbox
/// must not have them. They leave the bounding set, so the next program of root does not get
/// them.
fn give_capabilities_up() -> io::Result<()> {
    for capability in [CapabilitySet::NET_ADMIN, CapabilitySet::SETPCAP] {
        remove_capability_from_bounding_set(capability)?;
    }
    Ok(())
}

/// Returns the environment of a process: the defaults, overridden by the image's variables, the
/// guest's and the request's, in that order. Nothing comes from the agent's own environment.
fn environment(
    agent: &Agent,
    user: Option<&User>,
    request: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let home = user.map_or("/root", |user| &user.home);
    let mut defaults = vec![
        ("PATH", DEFAULT_PATH),
        ("TERM", "xterm-256color"),
        ("HOME", home),
        ("LANG", "C.UTF-8"),
    ];
    if let Some(user) = user {
        defaults.extend([("USER", user.name.as_str()), ("LOGNAME", &user.name)]);
    }
    let mut environment: BTreeMap<_, _> =
        defaults.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    environment.extend(agent.image_environment.clone());
    environment.extend(agent.settings.borrow().environment.clone());
    environment.extend(request.clone());
    environment
}

/// Returns the working directory of a process that starts in its user's home by default. `~` and
/// relative paths begin there, or in the `usual` directory.
fn directory_at_home(
    named: Option<&str>,
    usual: Option<&str>,
    home: &Path,
) -> Result<PathBuf, AgentError> {
    if named.is_none() && usual.is_none() && !home.is_dir() {
        return Ok(PathBuf::from("/"));
    }
    let directory = path_at_home(named.unwrap_or_default(), usual, home);
    Ok(working_directory(directory.to_str())?.unwrap_or(directory))
}

/// Returns the path that `named` means to a user: `~` is the home, and a relative path begins in
/// the `usual` directory or else in the home.
pub(crate) fn path_at_home(named: &str, usual: Option<&str>, home: &Path) -> PathBuf {
    match named.strip_prefix('~') {
        Some("") => home.to_owned(),
        Some(rest) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ if named.is_empty() => usual.map_or(home, Path::new).to_owned(),
        _ => usual.map_or(home, Path::new).join(named),
    }
}

/// Returns the working directory of a process, if not the agent's.
fn working_directory(cwd: Option<&str>) -> Result<Option<PathBuf>, AgentError> {
    let bad = |path: &Path, why: &str| {
        refused(ErrorKind::BadCwd, format!("start: chdir {}: {why}", path.display()))
    };
    let Some(cwd) = cwd else { return Ok(None) };
    let cwd = Path::new(cwd);
    match cwd.metadata() {
        Ok(metadata) if metadata.is_dir() => {
            std::path::absolute(cwd).map(Some).map_err(|error| bad(cwd, &errno_text(&error)))
        }
        Ok(_) => Err(bad(cwd, "not a directory")),
        Err(error) => Err(bad(cwd, &errno_text(&error))),
    }
}

fn lookup_failed(name: &str, error: &LookupError) -> AgentError {
    match error {
        LookupError::NotInPath => refused(
            ErrorKind::NotFound,
            format!("start: exec: {name:?}: executable file not found in $PATH"),
        ),
        LookupError::Missing(file) => refused(
            ErrorKind::NotFound,
            format!("start: fork/exec {}: no such file or directory", file.display()),
        ),
        LookupError::NotExecutable(file) => refused(
            ErrorKind::NotExecutable,
            format!("start: fork/exec {}: permission denied", file.display()),
        ),
    }
}

fn spawn_failed(program: &Path, error: &io::Error) -> AgentError {
    let kind = match error.raw_os_error() {
        // The program exists: its interpreter is missing, or the user may not execute it.
        Some(libc::ENOEXEC | libc::EACCES | libc::ENOENT) => ErrorKind::NotExecutable,
        Some(libc::EPERM) => ErrorKind::PermissionDenied,
        Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE) => ErrorKind::Limit,
        Some(libc::E2BIG) | None => ErrorKind::BadRequest,
        Some(_) => ErrorKind::Other,
    };
    refused(kind, format!("start: fork/exec {}: {}", program.display(), errno_text(error)))
}

fn other(message: impl Into<String>) -> AgentError {
    refused(ErrorKind::Other, message)
}
