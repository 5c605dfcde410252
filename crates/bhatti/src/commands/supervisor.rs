//! The supervisor of a data directory: of the daemon, and of a set-up that makes the first template.

use std::path::Path;
use std::sync::Arc;

use bhatti_engine::Accelerator;
use bhatti_image::ImageStore;
use bhatti_secret::{KeyError, SecretKey};
use bhatti_store::Store;
use bhatti_supervisor::{Supervisor, ThermalConfig};

use super::{engine, network};
use crate::config::Config;
use crate::error::CliError;
use crate::paths;

/// What goes wrong and when, `daemon:STEP` or `vmm:STEP`: for tests of what becomes of the sandbox then.
const FAULT: &str = "BHATTI_TEST_FAULT";

pub(super) async fn make(
    data_dir: &Path,
    config: &Config,
    store: &Arc<Store>,
) -> Result<Supervisor, CliError> {
    let directory = |name: &str| {
        let directory = data_dir.join(name);
        paths::create_data_dir(&directory).map(|()| directory)
    };
    let lohar = paths::lohar()?;
    let engine = engine::open(config, &lohar).await?;
    engine::settle(data_dir, store, engine.capabilities().name)?;
    // A VMM that waits saves little where what it runs has to be translated first; a VM that has run everything once saves nearly all.
    let emulated = engine.capabilities().accelerator == Some(Accelerator::Tcg);
    let forks_by_default = usize::from(emulated && config.ready_vmms != Some(0));
    let fault = std::env::var(FAULT).ok().map(|fault| fault.parse()).transpose();
    let network = network::open(config, store).await?;
    let config = bhatti_supervisor::Config {
        sandboxes_dir: directory("sandboxes")?,
        images: ImageStore::new(data_dir),
        lohar,
        boot_limit: config.boot_limit(),
        snapshots_dir: directory("snapshots")?,
        templates_dir: directory("templates")?,
        templates_bytes: config.template_bytes(),
        template_hostname: "template".parse().map_err(|error| CliError::of(&error))?,
        ready_vmms: config.ready_vmms.unwrap_or(1),
        ready_forks: config.ready_forks.unwrap_or(forks_by_default),
        memory_budget_mib: config.memory_budget_mib()?,
        secret_key: secret_key(data_dir, store)?,
        thermal: ThermalConfig {
            warm_after: config.thermal.warm_after(),
            cold_after: config.thermal.cold_after(),
        },
        volumes_dir: directory("volumes")?,
        network,
        fault: fault.map_err(|error| CliError::of(&error))?,
    };
    Ok(Supervisor::new(config, Arc::clone(store), engine))
}

/// The key of the data directory. Where there are secrets, it has to be there already.
fn secret_key(data_dir: &Path, store: &Store) -> Result<SecretKey, CliError> {
    let needed = store.has_secrets().map_err(|error| CliError::of(&error))?;
    SecretKey::open(data_dir, needed).map_err(|error| {
        let hint =
            "restore it from a backup; or give the secrets up: bhatti serve --forget-secrets";
        match error {
            KeyError::Damaged { .. } | KeyError::Missing { .. } => CliError::of(&error).hint(hint),
            KeyError::File { .. } => CliError::of(&error),
        }
    })
}
