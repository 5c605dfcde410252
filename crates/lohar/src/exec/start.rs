//! Starts the process of a command.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bhatti_proto::{ExecRequest, StartError, StartErrorKind};
use rustix::process::Pid;
use tokio::net::unix::pipe;

use crate::log::errno_text;
use crate::lookup::{LookupError, find_program};
use crate::reaper::{Exit, Reaper};

/// Where programs are looked for unless the request says otherwise.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process that was started.
pub(super) struct Process {
    /// The process, which leads the group of the same number.
    pub(super) group: Pid,
    pub(super) exit: Exit,
    pub(super) stdin: pipe::Sender,
    pub(super) stdout: pipe::Receiver,
    pub(super) stderr: pipe::Receiver,
}

/// Starts the command of `request`, with pipes.
pub(super) fn start(reaper: &Reaper, request: &ExecRequest) -> Result<Process, StartError> {
    let environment = environment(&request.env);
    let path = environment.get("PATH").map_or("", String::as_str);
    let cwd = working_directory(request.cwd.as_deref())?;
    let name = request.argv.first().map_or("", String::as_str);
    let program = find_program(name, path, &cwd).map_err(|error| lookup_failed(name, &error))?;

    #[expect(
        clippy::disallowed_methods,
        reason = "the guest's commands have nothing to do with the host's"
    )]
    let mut command = Command::new(&program);
    command
        .arg0(name)
        .args(&request.argv[1..])
        .env_clear()
        .envs(&environment)
        .current_dir(&cwd)
        .process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| spawn_failed(&program, &error))?;

    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let (Some(group), Some(stdin), Some(stdout), Some(stderr)) =
        (pid, child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(other("start: the process has no pipes".to_owned()));
    };
    let exit = reaper.watch(group);
    let pipes = |error: io::Error| other(format!("start: {}", errno_text(&error)));
    Ok(Process {
        group,
        exit,
        stdin: pipe::Sender::from_owned_fd(OwnedFd::from(stdin)).map_err(pipes)?,
        stdout: pipe::Receiver::from_owned_fd(OwnedFd::from(stdout)).map_err(pipes)?,
        stderr: pipe::Receiver::from_owned_fd(OwnedFd::from(stderr)).map_err(pipes)?,
    })
}

/// The environment of a process: the defaults, with the request's variables over them. Nothing of the agent's own.
fn environment(overrides: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let defaults = [
        ("PATH", DEFAULT_PATH),
        ("TERM", "xterm-256color"),
        ("HOME", "/root"),
        ("LANG", "en_US.UTF-8"),
    ];
    let mut environment: BTreeMap<_, _> =
        defaults.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    environment.extend(overrides.clone());
    environment
}

fn working_directory(cwd: Option<&str>) -> Result<PathBuf, StartError> {
    let bad = |path: &Path, why: &str| StartError {
        kind: StartErrorKind::BadCwd,
        message: format!("start: chdir {}: {why}", path.display()),
    };
    let Some(cwd) = cwd.filter(|cwd| !cwd.is_empty()) else {
        return std::env::current_dir()
            .map_err(|error| other(format!("start: getwd: {}", errno_text(&error))));
    };
    let cwd = Path::new(cwd);
    match cwd.metadata() {
        Ok(metadata) if metadata.is_dir() => {
            std::path::absolute(cwd).map_err(|error| bad(cwd, &errno_text(&error)))
        }
        Ok(_) => Err(bad(cwd, "not a directory")),
        Err(error) => Err(bad(cwd, &errno_text(&error))),
    }
}

fn lookup_failed(name: &str, error: &LookupError) -> StartError {
    let (kind, message) = match error {
        LookupError::NotInPath => (
            StartErrorKind::NotFound,
            format!("start: exec: {name:?}: executable file not found in $PATH"),
        ),
        LookupError::Missing(file) => (
            StartErrorKind::NotFound,
            format!("start: fork/exec {}: no such file or directory", file.display()),
        ),
        LookupError::NotExecutable(file) => (
            StartErrorKind::NotExecutable,
            format!("start: fork/exec {}: permission denied", file.display()),
        ),
    };
    StartError { kind, message }
}

fn spawn_failed(program: &Path, error: &io::Error) -> StartError {
    let kind = match error.raw_os_error() {
        Some(libc::ENOEXEC | libc::EACCES) => StartErrorKind::NotExecutable,
        // The program is there: what is missing is its interpreter.
        Some(libc::ENOENT) => StartErrorKind::NotExecutable,
        Some(libc::E2BIG) | None => StartErrorKind::BadRequest,
        Some(_) => StartErrorKind::Other,
    };
    StartError {
        kind,
        message: format!("start: fork/exec {}: {}", program.display(), errno_text(error)),
    }
}

const fn other(message: String) -> StartError {
    StartError { kind: StartErrorKind::Other, message }
}
