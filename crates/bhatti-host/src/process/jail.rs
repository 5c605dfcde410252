//! A jail: a process that confines itself to one directory before it reads untrusted input.
//!
//! The process keeps the descriptors that it has open. It can make files of any owner in its
//! directory, and can open nothing else, start no program and reach no network. The walls, from
//! the strongest on:
//!
//! 1. a filter that allows only the system calls for files, memory and its own end;
//! 2. a root directory of its own, in which set-user-ID files, devices and programs have no
//!    effect (only root of the host can make it);
//! 3. Landlock, as far as the kernel has it;
//! 4. five of root's capabilities, and limits for time and memory.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use landlock::{
    Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    Scope,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount,
    unmount,
};
use rustix::process::{Resource, Rlimit, pivot_root, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities, set_no_new_privs, unshare_unsafe,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use super::confine::{RULES, refuse_x32};

/// The system calls that a jailed process may make.
const ALLOWED: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_utimensat,
    libc::SYS_fsetxattr,
    libc::SYS_fremovexattr,
    libc::SYS_flistxattr,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    // Programs do not expect an error from these.
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The capabilities that it keeps: to make files of any owner, mode and file capability.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP);

/// The limits of a jailed process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JailLimits {
    /// Processor time, in whole seconds.
    pub cpu: Duration,
    /// Address space, in bytes.
    pub memory_bytes: u64,
    /// Size of a file, in bytes.
    pub file_bytes: u64,
}

/// Confines this process to `directory`, for good. The process must have one thread. Returns the
/// directory, which is then the process's root directory if this process is root of the host.
///
/// # Errors
///
/// Returns an error if the kernel refuses a step. The process may then be confined in part, and
/// must end. A root directory of its own is left out where the kernel does not permit it.
pub fn enter_jail(directory: &Path, limits: JailLimits) -> io::Result<OwnedFd> {
    let limit = |resource, value| {
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
    };
    limit(Resource::Cpu, limits.cpu.as_secs().max(1))?;
    limit(Resource::As, limits.memory_bytes)?;
    limit(Resource::Fsize, limits.file_bytes)?;
    limit(Resource::Core, 0)?;
    let root = match change_root(directory) {
        Ok(()) => open_directory(Path::new("/"))?,
        // A security module may refuse the mounts, and an initramfs cannot be a directory's parent.
        Err(Errno::PERM | Errno::ACCESS | Errno::INVAL) => open_directory(directory)?,
        Err(error) => return Err(error.into()),
    };
    let permitted = KEPT & rustix::thread::capabilities(None)?.permitted;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable })?;
    set_no_new_privs(true)?;
    restrict_to(&root)?;
    apply_filter(&filter()?).map_err(io::Error::other)?;
    Ok(root)
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Makes `directory` the root directory of this process, in a mount namespace of its own.
fn change_root(directory: &Path) -> rustix::io::Result<()> {
    // A network namespace takes milliseconds to make, and without sockets there is no network.
    let namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: these flags leave the table of file descriptors as it is.
    #[expect(unsafe_code, reason = "the call is unsafe for other flags")]
    unsafe {
        unshare_unsafe(namespaces)?;
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    mount_bind(directory, directory)?;
    let inert = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_remount(directory, MountFlags::BIND | inert, c"")?;
    rustix::process::chdir(directory)?;
    // The old root is stacked onto the new one, and removed: see pivot_root(2).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

/// Keeps this process from opening files outside of a directory, and from running any.
fn restrict_to(root: &OwnedFd) -> io::Result<()> {
    let run = AccessFs::Execute | AccessFs::IoctlDev | AccessFs::MakeChar | AccessFs::MakeBlock;
    let access: BitFlags<AccessFs> = AccessFs::from_all(RULES) & !run;
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(RULES))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(RULES)))
        .and_then(|rules| rules.scope(Scope::from_all(RULES)))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rule(PathBeneath::new(root.as_fd(), access)))
        .map_err(io::Error::other)?;
    rules.restrict_self().map(drop).map_err(io::Error::other)
}

fn filter() -> io::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|number| (*number, Vec::new())).collect();
    let kind = SeccompCmpOp::MaskedEq(libc::S_IFMT.into());
    let is_fifo = SeccompCondition::new(2, SeccompCmpArgLen::Dword, kind, libc::S_IFIFO.into())
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(io::Error::other)?;
    rules.insert(libc::SYS_mknodat, vec![is_fifo]);
    let architecture = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, architecture);
    let filter: BpfProgram = filter.and_then(TryInto::try_into).map_err(io::Error::other)?;
    Ok(refuse_x32().into_iter().chain(filter).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use rustix::fs::FileType;
    use rustix::net::{AddressFamily, SocketType, socket};
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    const LIMITS: JailLimits =
        JailLimits { cpu: Duration::from_secs(10), memory_bytes: 1 << 30, file_bytes: 1 << 20 };

    /// Runs `step` in a jailed process. Returns the error's number, or 0.
    fn jailed(step: fn(OwnedFd) -> rustix::io::Result<()>) -> i32 {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        #[expect(clippy::disallowed_methods, reason = "nothing is run: the preparation fails")]
        let mut command = std::process::Command::new("true");
        // SAFETY: `step` makes one system call, and the C library's heap may be used after fork.
        #[expect(unsafe_code, reason = "the step runs in a process of its own")]
        unsafe {
            command.pre_exec(move || {
                let root = enter_jail(&path, LIMITS)?;
                let number = step(root).err().map_or(0, Errno::raw_os_error);
                Err(io::Error::from_raw_os_error(number + 1000))
            });
        }
        command.spawn().unwrap_err().raw_os_error().unwrap() - 1000
    }

    #[test]
    fn jailed_process_makes_files_and_does_nothing_else() {
        const FLAGS: OFlags = OFlags::CREATE.union(OFlags::RDWR);
        let made = [
            jailed(|root| rustix::fs::openat(root, "new", FLAGS, Mode::RUSR).map(drop)),
            jailed(|root| rustix::fs::mknodat(root, "fifo", FileType::Fifo, Mode::RUSR, 0)),
        ];
        assert_eq!(made, [0, 0]);

        let refused = [
            jailed(|_| rustix::fs::open("/etc/passwd", OFlags::RDONLY, Mode::empty()).map(drop)),
            jailed(|root| {
                rustix::fs::openat(root, "../../etc/passwd", OFlags::RDONLY, Mode::empty())
                    .map(drop)
            }),
            jailed(|root| {
                rustix::fs::mknodat(root, "null", FileType::CharacterDevice, Mode::RUSR, 0x103)
            }),
            jailed(|_| socket(AddressFamily::UNIX, SocketType::STREAM, None).map(drop)),
            jailed(|_| kill_process(getpid(), Signal::TERM)),
            jailed(|_| rustix::fs::unlink("/etc/passwd-")),
        ];
        let is_refusal = |number| [libc::EPERM, libc::EACCES, libc::ENOENT].contains(number);
        assert!(refused.iter().all(is_refusal), "{refused:?}");
    }

    #[test]
    fn jailed_process_cannot_exceed_its_limits() {
        let long = jailed(|root| {
            let file = rustix::fs::openat(
                root,
                "long",
                OFlags::CREATE | OFlags::WRONLY,
                Mode::RUSR | Mode::WUSR,
            )?;
            rustix::fs::ftruncate(file, LIMITS.file_bytes)
        });
        assert_eq!(long, 0);
        let memory = jailed(|_| {
            Vec::<u8>::new().try_reserve_exact(2 << 30).map_err(|_| rustix::io::Errno::NOMEM)
        });
        assert_eq!(memory, libc::ENOMEM);
    }
}
