//! A daemon's routes without a socket, in this process, on their own store.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use bhatti_control::Control;
use bhatti_image::ImageStore;
use bhatti_node::{Config, NetworkConfig, Node, ThermalConfig};
use bhatti_qemu::{PROGRAM, Qemu};
use bhatti_secret::SecretKey;
use bhatti_server::{AppState, Listener, PublicAddress, StateParts, router};
use bhatti_store::Store;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use tokio::sync::watch;
use tokio::time::Instant;
use tower_service::Service;

use super::super::api::add_stopped;

/// Requests `path` `times` times, from one daemon or from a new daemon each time. The store has
/// `sandboxes` sandboxes.
pub(super) async fn ask(path: &str, sandboxes: u16, times: u64, daemons: Daemons) -> Result<()> {
    let place = tempfile::tempdir()?;
    let store = Arc::new(Store::open(place.path())?);
    (0..sandboxes).try_for_each(|number| add_stopped(&store, number))?;
    let (_stop, stopping) = watch::channel(false);
    let control = control(place.path(), &store)?;
    let daemon = || -> Result<_> {
        let state = AppState::new(StateParts {
            control: control.clone(),
            started: Instant::now(),
            public: PublicAddress::default(),
            proxy_limit: Duration::from_secs(1),
            stopping: stopping.clone(),
        })?;
        Ok(router(state, Listener::Unix))
    };
    let mut routes = daemon()?;
    for _ in 0..times {
        if daemons == Daemons::New {
            routes = daemon()?;
        }
        let request = Request::get(path).body(Empty::<Bytes>::new())?;
        let response = routes.call(request).await?;
        ensure!(response.status().is_success(), "{}", response.status());
        response.into_body().collect().await?;
    }
    Ok(())
}

/// Whether all requests go to one daemon, or each to a new one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Daemons {
    One,
    New,
}

/// A control half whose node is never asked to run anything.
fn control(place: &Path, store: &Arc<Store>) -> Result<Control> {
    let config = Config {
        sandboxes_dir: place.join("sandboxes"),
        images: ImageStore::new(place),
        registries: bhatti_node::RegistryConfig::default(),
        lohar: place.join("lohar"),
        boot_limit: Duration::from_secs(1),
        snapshots_dir: place.join("snapshots"),
        bases_dir: place.join("templates"),
        bases_bytes: 0,
        base_hostname: "template".parse()?,
        ready_vmms: 0,
        ready_forks: 0,
        memory_budget_mib: 1024,
        thermal: ThermalConfig {
            warm_after: Duration::from_secs(1),
            cold_after: Duration::from_secs(1),
        },
        volumes_dir: place.join("volumes"),
        network: NetworkConfig {
            host: Err("nothing runs here".to_owned()),
            range: "10.213.0.0/16".parse()?,
            reach_host: false,
        },
    };
    let engine = Arc::new(Qemu::engine(PROGRAM.into()));
    let control_config = bhatti_control::Config {
        secret_key: SecretKey::open(place, false)?,
        network_allowable: bhatti_types::Allowance::default(),
        pulled_images_bytes: None,
    };
    let start_node = |control| Node::new(config, Arc::clone(store), engine, control);
    Ok(Control::new(control_config, Arc::clone(store), start_node))
}
