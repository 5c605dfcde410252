//! Confinement: restrictions of a process, beyond those of its user.
//!
//! A VMM runs untrusted guests. A guest that breaks out into its VMM gains a process that reaches
//! only its own files (Landlock, by the kernel's Documentation/userspace-api/landlock.rst) and no
//! other process, no network and no socket of a daemon. Of root's capabilities the process has at
//! most the one to read the files that it reaches.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind::NotFound, ErrorKind::PermissionDenied};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, PathFdError, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope,
};
use rustix::process::{Gid, Resource, Rlimit, Uid, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, configure_capability_in_ambient_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter, sock_filter,
};

/// The newest Landlock version to ask for. An older kernel enforces the rules that it knows.
pub(super) const RULES: ABI = ABI::V6;

/// Directories of programs and of the files that they need, on common distributions.
const SYSTEM: [&str; 18] = [
    "/bin",
    "/sbin",
    "/usr/local/sbin",
    "/usr/bin",
    "/usr/sbin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/share",
    "/usr/local/bin",
    "/usr/local/lib",
    "/usr/local/share",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/gnu/store",
];

/// Files that any program may read.
const COMMON: [&str; 8] = [
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/localtime",
    "/dev/urandom",
    "/proc/filesystems",
    "/proc/sys/vm",
    "/sys/devices/system",
    "/sys/kernel/mm",
];

/// System calls that would get around the rules: those for sockets that have a name (access to
/// Docker's socket is as good as root), for other processes and memory shared with them, for the
/// metadata of files, and for `io_uring`, whose requests no filter sees. Truncation by name is
/// refused as well: older kernels have no rule for it.
const REFUSED: &[i64] = &[
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_semget,
    libc::SYS_msgget,
    libc::SYS_mq_open,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_send_signal,
    libc::SYS_sched_setattr,
    libc::SYS_ioprio_set,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_truncate,
    libc::SYS_openat2,
    libc::SYS_open_by_handle_at,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    SETXATTRAT,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    REMOVEXATTRAT,
    FILE_SETATTR,
    libc::SYS_io_uring_setup,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_unshare,
    libc::SYS_setns,
];

/// Refused system calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
const REFUSED_HERE: &[i64] = &[
    libc::SYS_creat,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[i64] = &[];

/// System call numbers that are the same on every architecture.
const FCHMODAT2: i64 = 452;
const SETXATTRAT: i64 = 463;
const REMOVEXATTRAT: i64 = 466;
const FILE_SETATTR: i64 = 469;

/// The files that a process reaches. Each path is a file, or a directory with all that is in it;
/// a path that does not exist is skipped. Beyond these, the process may always run and read the
/// programs and libraries of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reach<'a> {
    /// Files that the process runs and reads.
    pub run: &'a [&'a Path],
    /// Files that it only reads.
    pub read: &'a [&'a Path],
    /// Files that it reads and writes.
    pub write: &'a [&'a Path],
}

/// The restrictions for one process, ready to be applied to it.
pub struct Confinement {
    /// `None` on a kernel without Landlock.
    rules: Option<OwnedFd>,
    filter: BpfProgram,
    user: Option<User>,
    file_bytes: Option<u64>,
}

/// A user that a process switches to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's id. Its group has the same id.
    pub id: u32,
    /// One more group.
    pub group: Option<u32>,
    /// Whether it reads all files that the rules allow, regardless of their owner and mode.
    pub reads_all: bool,
}

/// Returns the kernel's Landlock version. From version 1 on, Landlock restricts a process to its
/// own files. From version 6 on (Linux 6.12), it also keeps the process from sending signals to
/// other processes. Returns 0 on a kernel without Landlock.
#[must_use]
pub fn landlock_version() -> u32 {
    // SAFETY: with this flag the call reads nothing, and returns a number or an error.
    #[expect(unsafe_code, reason = "no crate returns the kernel's version")]
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, 1_u32)
    };
    u32::try_from(version).unwrap_or_default()
}

impl Confinement {
    /// Builds the rules.
    ///
    /// # Errors
    ///
    /// Returns an error if a path cannot be opened, or if the kernel refuses the rules although
    /// it has Landlock.
    pub fn new(reach: Reach<'_>) -> io::Result<Self> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let run = read | AccessFs::Execute;
        let write = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
        let mut rules = Rules::new()?;
        // A path that cannot be opened counts as missing.
        let usual = [(&SYSTEM[..], run), (&COMMON[..], read), (&["/dev/null"], write)];
        for (paths, access) in usual {
            for path in paths {
                rules.allow(Path::new(path), access, &[NotFound, PermissionDenied])?;
            }
        }
        for (paths, access) in [(reach.run, run), (reach.read, read), (reach.write, write)] {
            for path in paths {
                rules.allow(path, access, &[NotFound])?;
            }
        }
        Ok(Self { rules: rules.0.into(), filter: filter()?, user: None, file_bytes: None })
    }

    /// Makes the process switch to another user, too. This needs root.
    #[must_use]
    pub fn as_user(self, user: User) -> Self {
        Self { user: Some(user), ..self }
    }

    /// Limits the files that the process makes or extends to this size, in bytes.
    #[must_use]
    pub fn with_files_up_to(self, file_bytes: u64) -> Self {
        Self { file_bytes: Some(file_bytes), ..self }
    }

    /// Switches to the user. Returns the capabilities that stay.
    fn become_user(&self) -> io::Result<CapabilitySet> {
        let read = CapabilitySet::DAC_READ_SEARCH & rustix::thread::capabilities(None)?.permitted;
        let Some(user) = self.user else { return Ok(read) };
        set_keep_capabilities(true)?;
        let (id, group) = (Uid::from_raw(user.id), Gid::from_raw(user.id));
        let groups = user.group.map(Gid::from_raw);
        set_thread_groups(groups.as_slice())?;
        set_thread_res_gid(group, group, group)?;
        set_thread_res_uid(id, id, id)?;
        Ok(if user.reads_all { read } else { CapabilitySet::empty() })
    }

    /// Applies the restrictions to this process, for good. Runs between fork and exec: makes only
    /// system calls, and allocates nothing unless it fails.
    pub(super) fn enter(&self) -> io::Result<()> {
        if let Some(bytes) = self.file_bytes {
            setrlimit(Resource::Fsize, Rlimit { current: Some(bytes), maximum: Some(bytes) })?;
        }
        // The capability to read stays, because files may belong to another user. The rules limit
        // the files that it reads.
        let kept = self.become_user()?;
        // A program that root starts has its capabilities anyway. A program of another user has
        // only the ambient ones.
        let inheritable = if self.user.is_some() { kept } else { CapabilitySet::empty() };
        set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable })?;
        if !inheritable.is_empty() {
            configure_capability_in_ambient_set(inheritable, true)?;
        }
        // Without this, a program that root starts would also get its capabilities back.
        set_no_new_privs(true)?;
        if let Some(rules) = &self.rules {
            // SAFETY: the descriptor is open for as long as `self` lives.
            #[expect(unsafe_code, reason = "the crate's call consumes the rules")]
            let laid = unsafe {
                libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0_u32)
            };
            if laid != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        apply_filter(&self.filter).map_err(io::Error::other)
    }
}

struct Rules(RulesetCreated);

impl Rules {
    fn new() -> io::Result<Self> {
        let rules = Ruleset::default()
            .handle_access(AccessFs::from_all(RULES))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(RULES)))
            .and_then(|rules| rules.scope(Scope::from_all(RULES)))
            .and_then(Ruleset::create);
        rules.map(Self).map_err(io::Error::other)
    }

    /// Allows this access to the files at `path`. Skips a path that cannot be opened for one of
    /// the reasons in `but`.
    fn allow(
        &mut self,
        path: &Path,
        access: BitFlags<AccessFs>,
        but: &[io::ErrorKind],
    ) -> io::Result<()> {
        let place = match PathFd::new(path) {
            Ok(place) => place,
            Err(PathFdError::OpenCall { source, .. }) if but.contains(&source.kind()) => {
                return Ok(());
            }
            Err(error) => return Err(io::Error::other(error)),
        };
        (&mut self.0).add_rule(PathBeneath::new(place, access)).map(drop).map_err(io::Error::other)
    }
}

fn filter() -> io::Result<BpfProgram> {
    let argument = |index, operator, value| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(io::Error::other)
    };
    let unconditional = REFUSED.iter().chain(REFUSED_HERE);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        unconditional.map(|number| (*number, Vec::new())).collect();
    // Refused only for other processes: glibc uses this call to set the process's own limits,
    // too.
    rules.insert(libc::SYS_prlimit64, vec![argument(0, SeccompCmpOp::Ne, 0)?]);
    // Files that are opened for reading, and truncated.
    let (access, emptied) = (libc::O_ACCMODE | libc::O_TRUNC, libc::O_RDONLY | libc::O_TRUNC);
    let emptied = u64::from(emptied.cast_unsigned());
    let open =
        |flags| argument(flags, SeccompCmpOp::MaskedEq(access.cast_unsigned().into()), emptied);
    rules.insert(libc::SYS_openat, vec![open(2)?]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, vec![open(1)?]);
    let architecture = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture);
    let filter: BpfProgram = filter.and_then(TryInto::try_into).map_err(io::Error::other)?;
    Ok(refuse_x32().into_iter().chain(filter).collect())
}

/// Returns the start of a filter that refuses the system calls of x32, which are those of x86-64
/// under other numbers. On a kernel without x32, the check costs three instructions.
pub(super) fn refuse_x32() -> Vec<sock_filter> {
    const NUMBER_OFFSET: u32 = 0;
    const X32_BIT: u32 = 0x4000_0000;
    if !cfg!(target_arch = "x86_64") {
        return Vec::new();
    }
    let instruction = |code: u32, jt, jf, k| sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt,
        jf,
        k,
    };
    vec![
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, NUMBER_OFFSET),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32_BIT),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned(),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs::{self, File};

    use super::*;
    use crate::durable;
    use crate::process::{Detached, Streams};

    /// Each line tries an operation, and prints its name if it succeeds.
    const TRIES: &str = "
        cat $0/read >/dev/null && echo reads
        echo new >>$0/written && echo writes
        cat $1/read && echo reads of others
        echo new >>$1/read && echo writes of others
        echo new >>$0/sealed && echo writes what is sealed
        chmod 600 $0/sealed && echo unseals
        : >$0/new && echo creates
        rm $0/read && echo removes
        kill -0 $PPID && echo signals others
    ";

    #[tokio::test]
    async fn confined_process_cannot_exceed_its_file_size_limit() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        let reach = Reach { write: &[place.path()], ..Reach::default() };
        let mut command = crate::process::command("dd");
        command
            .args(["if=/dev/urandom", "bs=4096", "count=100", "conv=notrunc"])
            .arg(format!("of={}", file.display()));
        let confinement = Confinement::new(reach).unwrap().with_files_up_to(10_000);
        crate::process::confine(&mut command, confinement);

        assert!(!command.output().await.unwrap().status.success());

        assert_eq!(fs::metadata(&file).unwrap().len(), 10_000);
    }

    #[tokio::test]
    async fn confined_process_only_performs_allowed_operations() {
        let (own, others) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for place in [own.path(), others.path()] {
            fs::write(place.join("read"), "read").unwrap();
        }
        fs::write(own.path().join("written"), "").unwrap();
        durable::write_sealed(&own.path().join("sealed"), b"sealed").unwrap();
        let printed = others.path().join("printed");
        let output = File::create(&printed).unwrap();
        let names = [own.path(), others.path()].map(|path| path.to_str().unwrap().to_owned());
        let [own_name, others_name] = names;
        let detached = Detached {
            program: OsStr::new("sh"),
            arguments: &["-c".to_owned(), TRIES.to_owned(), own_name, others_name],
            directory: Path::new("/"),
            environment: &[],
            inherited: &[],
            streams: Streams { output: &output, errors: &File::open("/dev/null").unwrap() },
            confinement: Some(
                Confinement::new(Reach { write: &[own.path()], ..Reach::default() }).unwrap(),
            ),
        };

        detached.spawn().unwrap().ended().await;

        let printed = fs::read_to_string(printed).unwrap();
        if landlock_version() == 0 {
            bhatti_testkit::skip("a process kept to its own files", "this kernel has no Landlock");
            assert!(!printed.contains("sealed") && !printed.contains("unseals"), "{printed}");
        } else {
            assert_eq!(printed, "reads\nwrites\n");
        }
    }
}
