//! Faults that a test injects at a step, through the variable `BHATTI_TEST_FAULT`.

use std::sync::LazyLock;

use super::Step;

/// The variable's value is `daemon:STEP` or `vmm:STEP`.
const VARIABLE: &str = "BHATTI_TEST_FAULT";

static FAULT: LazyLock<Option<Fault>> = LazyLock::new(|| {
    let text = std::env::var(VARIABLE).ok()?;
    Some(Fault::parse(&text).unwrap_or_else(|| panic!("{VARIABLE} has no step `{text}`")))
});

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The daemon dies, as by `kill -9`.
    Daemon(Step),
    /// The sandbox's VMM dies.
    Vmm(Step),
}

impl Fault {
    fn parse(text: &str) -> Option<Self> {
        let (victim, name) = text.split_once(':')?;
        let step = Step::ALL.into_iter().find(|step| step.as_str() == name)?;
        match victim {
            "daemon" => Some(Self::Daemon(step)),
            "vmm" => Some(Self::Vmm(step)),
            _ => None,
        }
    }
}

impl Step {
    const ALL: [Self; 18] = [
        Self::Paused,
        Self::Resumed,
        Self::StopNoted,
        Self::Saved,
        Self::Ended,
        Self::StartNoted,
        Self::Staged,
        Self::Loaded,
        Self::Consumed,
        Self::Woken,
        Self::Merged,
        Self::Captured,
        Self::Frozen,
        Self::Unnamed,
        Self::Inserted,
        Self::Running,
        Self::DestroyNoted,
        Self::Removed,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::StopNoted => "stop_noted",
            Self::Saved => "saved",
            Self::Ended => "ended",
            Self::StartNoted => "start_noted",
            Self::Staged => "staged",
            Self::Loaded => "loaded",
            Self::Consumed => "consumed",
            Self::Woken => "woken",
            Self::Merged => "merged",
            Self::Captured => "captured",
            Self::Frozen => "frozen",
            Self::Unnamed => "unnamed",
            Self::Inserted => "inserted",
            Self::Running => "running",
            Self::DestroyNoted => "destroy_noted",
            Self::Removed => "removed",
        }
    }
}

pub(crate) fn reached(step: Step) -> bool {
    if *FAULT == Some(Fault::Daemon(step)) {
        tracing::warn!(step = step.as_str(), "Aborting at this step, for a test");
        std::process::abort();
    }
    *FAULT == Some(Fault::Vmm(step))
}
