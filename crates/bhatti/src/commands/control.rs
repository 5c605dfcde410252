//! Control and node over a data directory, for the daemon and for `bhatti setup`, which makes the
//! first base snapshot.

use std::path::Path;
use std::sync::Arc;

use bhatti_control::Control;
use bhatti_engine::Accelerator;
use bhatti_image::ImageStore;
use bhatti_node::{Node, ThermalConfig};
use bhatti_store::Store;
use bhatti_types::Allowance;

use super::{engine, network, secret_key};
use crate::config::Config;
use crate::error::CliError;
use crate::paths;

pub(super) async fn make(
    data_dir: &Path,
    config: &Config,
    store: &Arc<Store>,
) -> Result<Control, CliError> {
    let directory = |name: &str| {
        let directory = data_dir.join(name);
        paths::create_data_dir(&directory).map(|()| directory)
    };
    let lohar = paths::lohar()?;
    let engine = engine::open(config, &lohar).await?;
    engine::settle(data_dir, store, engine.capabilities().name)?;
    // Under TCG a waiting VMM saves little, because the guest's code is translated when it first
    // runs. A VM that has run the first commands saves nearly all of that.
    let emulated = engine.capabilities().accelerator == Some(Accelerator::Tcg);
    let forks_by_default = usize::from(emulated && config.ready_vmms != Some(0));
    let network = network::open(config, store).await?;
    let node_config = bhatti_node::Config {
        sandboxes_dir: directory("sandboxes")?,
        images: ImageStore::new(data_dir),
        registries: config.registries()?,
        lohar,
        boot_limit: config.boot_limit(),
        snapshots_dir: directory("snapshots")?,
        bases_dir: directory("templates")?,
        bases_bytes: config.template_bytes(),
        base_hostname: "template".parse().map_err(|error| CliError::of(&error))?,
        ready_vmms: config.ready_vmms.unwrap_or(1),
        ready_forks: config.ready_forks.unwrap_or(forks_by_default),
        memory_budget_mib: config.memory_budget_mib()?,
        thermal: ThermalConfig {
            warm_after: config.thermal.warm_after(),
            cold_after: config.thermal.cold_after(),
        },
        volumes_dir: directory("volumes")?,
        network,
    };
    let network_allowable = Allowance::parse(&config.network_allowable)
        .map_err(|error| CliError::of(&error).hint("see `network_allowable` in config.yaml"))?;
    let control_config = bhatti_control::Config {
        secret_key: secret_key::open(data_dir, store).await?,
        network_allowable,
        pulled_images_bytes: config.pulled_images_bytes(),
    };
    let start_node = |control| Node::new(node_config, Arc::clone(store), engine, control);
    Ok(Control::new(control_config, Arc::clone(store), start_node))
}
