//! Where the agent runs, which decides how much of the system it may change.

/// The directory of job output and of jobs that restart, in a guest.
pub(crate) const STATE_DIR: &str = "/var/lib/lohar";

/// Where the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Surroundings {
    /// As PID 1 of a VM, with its own kernel.
    Machine,
    /// As PID 1 of a container, on the host's kernel.
    Container,
    /// As an ordinary process: test mode.
    Process,
}

impl Surroundings {
    /// Whether this is a guest, with users of its own.
    pub(crate) const fn is_guest(self) -> bool {
        matches!(self, Self::Machine | Self::Container)
    }

    /// Whether the agent has its own kernel: clock, cgroups, mounts and random numbers.
    pub(crate) const fn has_kernel(self) -> bool {
        matches!(self, Self::Machine)
    }
}
