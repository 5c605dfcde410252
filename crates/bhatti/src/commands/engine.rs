//! Opens the engine that the configuration names.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bhatti_docker::DockerEngine;
use bhatti_engine::{Accelerator, Engine};
use bhatti_firecracker::{Firecracker, Unusable};
use bhatti_host::process::{forgo_huge_pages, is_root, landlock_version};
use bhatti_host::{durable, kvm};
use bhatti_qemu::Qemu;
use bhatti_store::Store;

use crate::config::{Config, EngineChoice};
use crate::error::CliError;

/// File that names the engine of a data directory.
const FILE: &str = "engine";
const QEMU: &str = "qemu";

/// Opens the engine.
pub(super) async fn open(config: &Config, lohar: &Path) -> Result<Arc<dyn Engine>, CliError> {
    match config.engine {
        EngineChoice::Qemu => {
            check_landlock(config)?;
            let engine = Qemu::engine(config.qemu());
            let qemu = Arc::clone(engine.vmm());
            // The first boot need not wait for the measurement.
            tokio::task::spawn_blocking(move || qemu.tsc_khz());
            if engine.capabilities().accelerator == Some(Accelerator::Tcg) {
                // QEMU requests huge pages for translated code, which wastes 4 of 62 MiB.
                if let Err(error) = forgo_huge_pages() {
                    tracing::warn!(%error, "Failed to disable huge pages; VMs take more memory than they need");
                }
            }
            Ok(Arc::new(engine))
        }
        EngineChoice::Firecracker => {
            let found = bhatti_firecracker::check(&config.firecracker(), config.jailer.as_deref())
                .await
                .map_err(|error| {
                    CliError::of(&error).hint(format!("{}, or use `engine: qemu`", mend(&error)))
                })?;
            kvm::check().map_err(|error| {
                CliError::of(&error)
                    .hint("Firecracker needs KVM; without KVM, set `engine: qemu` in config.yaml")
            })?;
            Ok(Arc::new(Firecracker::engine(found)))
        }
        EngineChoice::Docker => {
            let found = bhatti_docker::check(&config.docker()).await.map_err(|error| {
                CliError::of(&error)
                    .hint("start it, or name its socket with `docker: PATH` in config.yaml, or use `engine: qemu`")
            })?;
            let engine = DockerEngine::new(found, std::path::absolute(lohar)?);
            tokio::spawn(engine.prepare());
            Ok(Arc::new(engine))
        }
    }
}

pub(super) const NO_LANDLOCK: &str =
    "this kernel has no Landlock, so an escaped guest could read every file of this host";
pub(super) const WITHOUT_LANDLOCK: &str = "set `allow_without_landlock: true` in config.yaml to \
     accept the risk, run the daemon as another user than root, or boot a kernel with `landlock` \
     among its `lsm=`";

/// Returns whether a daemon refuses QEMU on a kernel without Landlock.
pub(super) fn needs_landlock(config: &Config) -> bool {
    is_root() && !config.allow_without_landlock
}

/// Refuses QEMU for root without Landlock: QEMU keeps CAP_DAC_READ_SEARCH, and only Landlock limits
/// that to the VM's files.
pub(super) fn check_landlock(config: &Config) -> Result<(), CliError> {
    if landlock_version() > 0 {
        return Ok(());
    }
    if needs_landlock(config) {
        let refused = format!("QEMU is not run as root: {NO_LANDLOCK}");
        return Err(CliError::new(refused).hint(WITHOUT_LANDLOCK));
    }
    tracing::warn!(
        "QEMU processes can read files of other VMs: this kernel has no Landlock, or `lsm=` leaves it out"
    );
    Ok(())
}

/// Returns the hint for a Firecracker that cannot be used.
pub(super) fn mend(error: &Unusable) -> String {
    match error {
        Unusable::NoJailer { .. } => {
            "install the jailer of the same release, and name it with `jailer: PATH` in config.yaml"
                .to_owned()
        }
        Unusable::NotStatic { .. } => {
            "name one of the published programs with `firecracker: PATH` in config.yaml".to_owned()
        }
        _ => format!(
            "install {} or later, and name it with `firecracker: PATH` in config.yaml",
            bhatti_firecracker::MINIMUM
        ),
    }
}

/// Records the engine of this data directory. No engine can use another's sandboxes and snapshots,
/// so the engine cannot change while there are any.
pub(super) fn settle(data_dir: &Path, store: &Store, name: &str) -> Result<(), CliError> {
    let path = data_dir.join(FILE);
    let before = match fs::read_to_string(&path) {
        Ok(text) => Some(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    if before.as_deref() == Some(name) {
        return Ok(());
    }
    // A data directory without the file dates from before there was a choice: its engine is QEMU.
    let before = before.unwrap_or_else(|| QEMU.to_owned());
    let made = store.count_made().map_err(|error| CliError::of(&error))?;
    if before != name && made > 0 {
        return Err(CliError::new(format!(
            "{made} sandboxes and snapshots were made with the engine `{before}`, but `{name}` is configured"
        ))
        .hint(format!("set `engine: {before}` in config.yaml, or destroy them with that engine first")));
    }
    durable::write(&path, format!("{name}\n").as_bytes())?;
    Ok(())
}
