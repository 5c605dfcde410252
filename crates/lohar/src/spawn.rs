//! Starts a program as vfork(2) does: until the child has executed the program, it borrows the
//! agent's memory. Copying that memory, only to discard the copy, took a sixth of the time of a
//! first command in an emulated guest.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::process::{Pid, WaitOptions, chdir, waitpid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

/// The interpreter of a script that names none, as in execvp(3).
const SHELL: &CStr = c"/bin/sh";

/// The stack of the child until it executes the program, in bytes. The child makes system calls
/// and does hardly anything else.
const STACK_BYTES: usize = 64 << 10;

/// The standard signals, for which a handler may be installed.
const SIGNALS: std::ops::RangeInclusive<c_int> = 1..=31;

/// A program to start.
pub(crate) struct Program<'a> {
    pub(crate) file: CString,
    pub(crate) arguments: Vec<CString>,
    /// `NAME=VALUE` each.
    pub(crate) environment: Vec<CString>,
    /// The working directory, if not the agent's.
    pub(crate) directory: Option<CString>,
    /// Its standard input, output and error output.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
}

/// The data that the child reads, and the place for its error.
struct Plan<'a> {
    program: &'a Program<'a>,
    arguments: Vec<*const c_char>,
    shell_arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    settle: &'a dyn Fn() -> io::Result<()>,
    error: AtomicI32,
}

impl Program<'_> {
    /// Starts the program, and returns when it runs. Before that, the child calls `settle`, which
    /// must only make system calls: it must neither allocate nor take a lock. The child has the
    /// default action for each signal, and blocks none.
    ///
    /// # Errors
    ///
    /// Returns the error of `settle`, or why the program could not be executed. In these cases
    /// the child has ended and is reaped.
    pub(crate) fn start(&self, settle: &dyn Fn() -> io::Result<()>) -> io::Result<Pid> {
        let arguments = pointers(&self.arguments);
        let for_shell = [SHELL.as_ptr(), self.file.as_ptr()];
        let plan = Plan {
            program: self,
            shell_arguments: for_shell.into_iter().chain(arguments[1..].iter().copied()).collect(),
            arguments,
            environment: pointers(&self.environment),
            settle,
            error: AtomicI32::new(0),
        };
        let child = with_signals_blocked(|| plan.clone_into_child())?;
        match plan.error.into_inner() {
            0 => Ok(child),
            error => {
                waitpid(Some(child), WaitOptions::empty())?;
                Err(io::Error::from_raw_os_error(error))
            }
        }
    }
}

impl Plan<'_> {
    /// Creates the child, and waits until it has executed the program or has ended.
    fn clone_into_child(&self) -> io::Result<Pid> {
        let mut stack =
            Box::<[MaybeUninit<u128>]>::new_uninit_slice(STACK_BYTES / size_of::<u128>());
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: only the child uses the stack. The stack and the plan outlive that use, because
        // this thread is suspended until the child no longer uses either. The child runs nothing
        // but `child`, which never returns.
        #[expect(unsafe_code, reason = "nothing safe starts a process without a copy of the agent")]
        let number = unsafe {
            let top = stack.as_mut_ptr_range().end.cast::<c_void>();
            libc::clone(child, top, flags, ptr::from_ref(self).cast_mut().cast::<c_void>())
        };
        Pid::from_raw(number.max(0)).ok_or_else(io::Error::last_os_error)
    }

    /// Executes the program, in the child. Returns the error if that fails.
    fn become_program(&self) -> io::Error {
        match self.prepare() {
            Ok(()) => self.execute(),
            Err(error) => error,
        }
    }

    fn prepare(&self) -> io::Result<()> {
        let [stdin, stdout, stderr] = self.program.stdio;
        dup2_stdin(stdin)?;
        dup2_stdout(stdout)?;
        dup2_stderr(stderr)?;
        if let Some(directory) = &self.program.directory {
            chdir(directory.as_c_str())?;
        }
        (self.settle)()
    }

    fn execute(&self) -> io::Error {
        let environment = self.environment.as_ptr();
        // SAFETY: each array ends with a null pointer. The arrays and their strings live as long
        // as the plan.
        #[expect(unsafe_code, reason = "no safe wrapper executes without allocating")]
        unsafe {
            libc::execve(self.program.file.as_ptr(), self.arguments.as_ptr(), environment);
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::ENOEXEC) {
                libc::execve(SHELL.as_ptr(), self.shell_arguments.as_ptr(), environment);
            }
            error
        }
    }
}

/// The function of the child. After the change of its user and before the execution of the
/// program, processes of that user could trace the child, and with it the agent's memory. The
/// kernel prevents this: memory whose owner changes becomes undumpable, and the agent makes its
/// memory undumpable from the start.
extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: `clone_into_child` passed this pointer to a plan, and waits.
    #[expect(unsafe_code, reason = "clone hands over a pointer")]
    let plan = unsafe { &*plan.cast::<Plan<'_>>() };
    // The agent's signal handlers would write to the agent's memory.
    unhandle_signals();
    let error = plan.become_program();
    plan.error.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
    // SAFETY: `_exit` ends this process at once, and runs no exit handlers of the agent.
    #[expect(unsafe_code, reason = "the agent's memory must not be cleaned up")]
    unsafe {
        libc::_exit(127)
    }
}

/// Resets each signal to its default action and unblocks all signals, in the child.
fn unhandle_signals() {
    // SAFETY: these calls change only this process's own signal table and mask.
    #[expect(unsafe_code, reason = "no safe wrapper of these exists")]
    unsafe {
        for signal in SIGNALS {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none = MaybeUninit::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
    }
}

/// Runs `act` with all signals blocked in this thread.
fn with_signals_blocked<T>(act: impl FnOnce() -> T) -> T {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: both sets are filled before they are read.
    #[expect(unsafe_code, reason = "no safe wrapper of these exists")]
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = act();
    // SAFETY: the set was filled above.
    #[expect(unsafe_code, reason = "no safe wrapper of this exists")]
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
    }
    result
}

/// Returns the strings as the null-terminated array that execve(2) takes.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use rustix::io::Errno;
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    /// Returns the output of a program. Its input is the read end of the same pipe.
    fn output(file: &Path, argument: &CStr) -> io::Result<String> {
        let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
        let program = Program {
            file: CString::new(file.to_str().unwrap())?,
            arguments: vec![c"name".into(), argument.into()],
            environment: vec![c"A=1".into()],
            directory: Some(c"/".into()),
            stdio: [from.as_fd(), to.as_fd(), to.as_fd()],
        };
        let child = program.start(&|| Ok(()))?;
        drop(to);
        let mut printed = String::new();
        File::from(from).read_to_string(&mut printed)?;
        waitpid(Some(child), WaitOptions::empty())?;
        Ok(printed)
    }

    #[test]
    fn script_that_names_no_interpreter_is_run_by_the_shell() {
        let script = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        fs::write(&script, "echo $1 $A $(pwd)").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();

        assert_eq!(output(&script, c"word").unwrap(), "word 1 /\n");
    }

    #[test]
    fn child_blocks_ignores_and_handles_no_standard_signal() {
        let status = output(Path::new("/bin/cat"), c"/proc/self/status").unwrap();

        let sets = ["SigBlk:", "SigIgn:", "SigCgt:"]
            .map(|name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim());
        for set in sets {
            // Signals above 31 have no names; glibc reserves two of them.
            assert_eq!(u64::from_str_radix(set, 16).unwrap() & 0x7fff_ffff, 0, "{status}");
        }
    }

    #[test]
    fn program_that_cannot_be_executed_is_an_error_and_leaves_no_child() {
        let error = output(Path::new("/nowhere"), c"").unwrap_err();

        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        assert_eq!(waitpid(None, WaitOptions::NOHANG).unwrap_err(), Errno::CHILD);
    }
}
