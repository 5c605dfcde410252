//! Brings up the VM of a new sandbox, from a base snapshot, from a saved sandbox or by booting,
//! and gives its guest the sandbox's identity.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::CallError;
use bhatti_engine::{RestoreError, Vm, VmSpec};
use bhatti_image::BootFiles;
use bhatti_proto::{Applied, IdentityReport};
use bhatti_store::SandboxRow;
use bhatti_types::Report;
use tokio::time::{Instant, timeout};
use tracing::warn;

use crate::Shared;
use crate::bases::{Base, Recipe};
use crate::boot_source::{BootSource, CreateError};
use crate::driver::access::Running;
use crate::driver::steps::Step;
use crate::driver::{Sandbox, configure};
use crate::identity::{self, Extras, GUEST_CONFIG_BYTES_MAX};
use crate::networks::{self, NetworkError};
use crate::pool::{self, Spare, Stage};
use crate::volumes::{self, OwnVolumes};

/// Accepted error of a new sandbox's clock.
const CLOCK_EXACT: Duration = Duration::from_millis(10);

/// Brings up a sandbox's VM and gives its guest the sandbox's identity. Returns the guest's report
/// if the VM was restored.
pub(crate) async fn bring_up(
    shared: &Arc<Shared>,
    sandbox: &Sandbox,
    row: &SandboxRow,
    extras: &Extras,
    source: BootSource,
) -> Result<Option<String>, CreateError> {
    let mut config = identity::config(row, extras);
    // All settings must fit one message, whether they are sent now or later.
    config.init.clone_from(&row.spec.init);
    let bytes = serde_json::to_vec(&config)?.len();
    if bytes > GUEST_CONFIG_BYTES_MAX {
        return Err(CreateError::TooMuch { bytes });
    }
    Ok(match source {
        BootSource::Boot(files, _) => {
            boot(shared, sandbox, row, extras, files).await?;
            None
        }
        BootSource::Base { recipe, base, spare } => {
            // The tap is not connected yet. Without an init script no user process can run, so the
            // guest may start before the firewall rules are in place.
            let may_run = row.spec.init.is_empty();
            let enforced = shared.enforce_network(row.owner, row.address);
            let forked = fork_base(shared, row, &recipe, &base, spare);
            let report = settle(sandbox, row, extras, forked, enforced, may_run).await?;
            // Sandboxes with volumes have no spares: their volumes are known only at the request.
            if recipe.slots == 0 {
                let shared = Arc::clone(shared);
                tokio::spawn(
                    async move { shared.spares.fill(&shared, &base, recipe.memory).await },
                );
            }
            Some(report)
        }
        BootSource::Saved { snapshot, token, .. } => {
            let restored = async {
                let admitted = shared.admit(row.spec.memory).await?;
                let vm = restore(shared, row, &snapshot, OwnVolumes::Saved(&snapshot)).await?;
                Ok(Running::new(vm, &token, admitted))
            };
            let enforced = shared.enforce_network(row.owner, row.address);
            Some(settle(sandbox, row, extras, restored, enforced, false).await?)
        }
    })
}

/// Makes a paused VM from a base snapshot. If a spare cannot be used, restores the snapshot. If
/// the snapshot cannot be used, whatever the reason, makes it anew once.
async fn fork_base(
    shared: &Arc<Shared>,
    row: &SandboxRow,
    recipe: &Recipe,
    base: &Base,
    spare: Option<Spare>,
) -> Result<Running, CreateError> {
    if let Some(spare) = spare {
        let (stage, admitted) = spare
            .claim(shared)
            .map_err(|source| RestoreError::File { step: "claim a spare VM", source })?;
        match stage.load().await {
            Ok(vm) => return Ok(Running::new(vm, "", admitted)),
            Err(error) => {
                warn!(error = %Report(&error), "A spare VM cannot be used");
                pool::remove(shared, row.id).await;
            }
        }
    }
    let admitted = shared.admit(row.spec.memory).await?;
    let vm = match restore(shared, row, &base.directory, OwnVolumes::Fresh).await {
        Ok(vm) => vm,
        Err(CreateError::Restore(
            error @ (RestoreError::Damaged { .. } | RestoreError::Mismatch { .. }),
        )) => {
            warn!(error = %Report(&error), "A base snapshot cannot be used");
            pool::remove(shared, row.id).await;
            shared.bases.discard(base).await;
            let base = shared.bases.get(shared, row.owner, recipe).await?;
            restore(shared, row, &base.directory, OwnVolumes::Fresh).await?
        }
        Err(error) => return Err(error),
    };
    Ok(Running::new(vm, "", admitted))
}

async fn restore(
    shared: &Shared,
    row: &SandboxRow,
    snapshot: &Path,
    own: OwnVolumes<'_>,
) -> Result<Arc<dyn Vm>, CreateError> {
    let volumes = volumes::files(shared, row.id, &row.volumes, own).await?;
    let staged = pool::stage(shared, row.id, snapshot, row.address.is_some(), volumes).await?;
    Ok(Stage::Waiting(staged).load().await?)
}

/// Runs a restored VM and gives its guest this sandbox's identity. Returns the guest's report.
/// `enforced` puts the network's rules in force, and the tap is connected afterwards. With
/// `early`, the VM runs meanwhile.
async fn settle(
    sandbox: &Sandbox,
    row: &SandboxRow,
    extras: &Extras,
    restored: impl Future<Output = Result<Running, CreateError>>,
    enforced: impl Future<Output = Result<(), NetworkError>>,
    early: bool,
) -> Result<String, CreateError> {
    let connect = || sandbox.shared.connect_network(row.id, row.owner, row.address);
    let (running, report) = if early {
        let restored = async {
            let running = restored.await?;
            let report = assume_identity(sandbox, row, extras, &running).await;
            Ok::<_, CreateError>((running, report))
        };
        // Both futures run to their ends: half finished steps cannot be undone.
        let (restored, enforced) = tokio::join!(restored, enforced);
        let restored = restored?;
        enforced?;
        connect().await?;
        restored
    } else {
        let (restored, enforced) = tokio::join!(restored, enforced);
        let running = restored?;
        enforced?;
        connect().await?;
        let report = assume_identity(sandbox, row, extras, &running).await;
        (running, report)
    };
    let AssumedIdentity { report, clock_error } = report?;
    warn_of_failures(row, &report);
    if let Applied::Failed { message } = &report.files
        && !extras.files.is_empty()
    {
        return Err(CreateError::Files(message.clone()));
    }
    if let Applied::Failed { message } = &report.first_setup
        && !row.volumes.is_empty()
    {
        return Err(CreateError::Mount(message.clone()));
    }
    let text = serde_json::to_string(&report)?;
    sandbox.shared.store.set_sandbox_identity(&sandbox.claim, &text)?;
    let running = running.with_token(&row.agent_token);
    hand_over_files(&sandbox.shared, row, extras, &running).await?;
    if clock_error > CLOCK_EXACT {
        // The slow message left the clock late. This message sets only the clock, so it is fast.
        sandbox.tell_woken(&running).await;
    }
    sandbox.open(running)?;
    Ok(text)
}

/// A guest's report, and the maximum error of its clock.
struct AssumedIdentity {
    report: IdentityReport,
    clock_error: Duration,
}

/// Resumes a VM and gives its guest this sandbox's identity.
async fn assume_identity(
    sandbox: &Sandbox,
    row: &SandboxRow,
    extras: &Extras,
    running: &Running,
) -> Result<AssumedIdentity, CreateError> {
    running.vm.resume().await?;
    sandbox.reached(Step::Running).await;
    let began = Instant::now();
    let limit = sandbox.shared.config.boot_limit;
    let assumed = timeout(limit, async {
        running.agent.reach().await?;
        // Built only now, so that the time in the message is the time of its arrival.
        let identity = identity::identity(row, extras).map_err(|_| CallError::Entropy)?;
        running.agent.assume_identity(&identity).await
    });
    let mut report = assumed
        .await
        .unwrap_or(Err(CallError::Silent { limit }))
        .map_err(CreateError::Unconfigured)?;
    // The clock is late by the time that the message took, and seems later by the time that the
    // answer took.
    let clock_error = report.clock_ns.take().map_or_else(|| began.elapsed(), identity::clock_error);
    Ok(AssumedIdentity { report, clock_error })
}

fn warn_of_failures(row: &SandboxRow, report: &IdentityReport) {
    let IdentityReport {
        rng,
        wall_clock,
        hostname,
        machine_id,
        token,
        environment,
        files,
        first_setup,
        addresses,
        connections,
        clock_ns: _,
    } = report;
    let parts = [
        rng,
        wall_clock,
        hostname,
        machine_id,
        token,
        environment,
        files,
        first_setup,
        addresses,
        connections,
    ];
    for part in parts {
        if let Applied::Failed { message } = part {
            warn!(sandbox = %row.id, message, "Guest failed to apply a part of its identity");
        }
    }
}

async fn boot(
    shared: &Arc<Shared>,
    sandbox: &Sandbox,
    row: &SandboxRow,
    extras: &Extras,
    files: BootFiles,
) -> Result<(), CreateError> {
    let admitted = shared.admit(row.spec.memory).await?;
    let vm_spec = VmSpec {
        id: row.id,
        hostname: row.spec.name.clone(),
        cpus: row.spec.cpus,
        memory: row.spec.memory,
        disk: row.spec.disk,
        directory: shared.directory(row.id),
        kernel: files.kernel,
        initramfs: files.initramfs,
        root_base: Some(files.root),
        tap: networks::tap(row.id, row.address.is_some()),
        volumes: volumes::files(shared, row.id, &row.volumes, OwnVolumes::Fresh).await?,
        awaits_root: false,
        is_builder: row.spec.labels.is_of_build(),
        boot_limit: shared.config.boot_limit,
    };
    shared.enforce_network(row.owner, row.address).await?;
    let vm = shared.engine.boot(&vm_spec).await?;
    sandbox.reached(Step::Running).await;
    shared.connect_network(row.id, row.owner, row.address).await?;
    let running = Running::new(vm, "", admitted);
    configure(shared, row, extras, &running).await.map_err(|error| match error {
        CallError::Agent(refused) if !row.volumes.is_empty() => CreateError::Mount(refused.message),
        CallError::Agent(refused) if !extras.files.is_empty() => {
            CreateError::Files(refused.message)
        }
        CallError::Refused(message) if !extras.files.is_empty() => CreateError::Files(message),
        error => CreateError::Unconfigured(error),
    })?;
    let running = running.with_token(&row.agent_token);
    hand_over_files(shared, row, extras, &running).await?;
    Ok(sandbox.open(running)?)
}

/// Writes the files that were too large for the configuration message. Then starts the init
/// script, which may need them.
async fn hand_over_files(
    shared: &Shared,
    row: &SandboxRow,
    extras: &Extras,
    running: &Running,
) -> Result<(), CreateError> {
    if !extras.files_follow() {
        return Ok(());
    }
    let agent = &running.agent;
    let handed_over = async {
        for (path, file) in &extras.files {
            let written = agent.write_configured_file(path, &file.mode, &file.content).await;
            written.map_err(|error| match error {
                CallError::Agent(refused) => CreateError::Files(refused.message),
                error => CreateError::Unconfigured(error),
            })?;
        }
        if row.spec.init.is_empty() {
            return Ok(());
        }
        agent.start_init(&row.spec.init).await.map_err(CreateError::Unconfigured)
    };
    let limit = shared.config.boot_limit;
    let late = || Err(CreateError::Unconfigured(CallError::Silent { limit }));
    timeout(limit, handed_over).await.unwrap_or_else(|_| late())
}
