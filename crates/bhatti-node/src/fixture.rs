//! A node over a data directory of its own and a simulated engine, for tests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::Engine;
use bhatti_image::ImageStore;
use bhatti_store::{NewSandbox, Store};
use bhatti_testkit::{Found, FoundVms};
use bhatti_types::{SandboxId, SandboxSpec, SandboxState, SecretName, TimeLimit, UserId};
use serde_json::Value;

use crate::{Config, ControlPlane, NetworkConfig, Node, ThermalConfig};

/// A control half without events and secrets.
struct NoControl;

impl ControlPlane for NoControl {
    fn record(&self, _: &'static str, _: UserId, _: SandboxId, _: Value) {}

    fn secrets(&self, _: UserId, _: &[SecretName]) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
}

/// What is found of a sandbox's snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Saved {
    No,
    Yes,
    Used,
    Ran,
}

/// A data directory with a store.
pub(crate) struct TestData {
    pub(crate) data: tempfile::TempDir,
    pub(crate) store: Arc<Store>,
    pub(crate) vms: Arc<FoundVms>,
}

impl TestData {
    pub(crate) fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        for directory in ["sandboxes", "snapshots", "templates", "volumes"] {
            std::fs::create_dir(data.path().join(directory)).unwrap();
        }
        let store = Arc::new(Store::open(data.path()).unwrap());
        Self { data, store, vms: Arc::default() }
    }

    pub(crate) fn directory(&self, id: SandboxId) -> std::path::PathBuf {
        self.data.path().join("sandboxes").join(id.to_string())
    }

    /// Puts a sandbox in place as an earlier daemon left it.
    pub(crate) fn leave(
        &self,
        number: u8,
        state: SandboxState,
        found: Found,
        saved: Saved,
    ) -> SandboxId {
        let id = SandboxId::from_entropy([number; 8]);
        let spec =
            SandboxSpec::plain(format!("s{number}").parse().unwrap(), "minimal".parse().unwrap());
        let (origin, agent_token) = ("boot".to_owned(), String::new());
        let new = NewSandbox {
            id,
            owner: UserId::ADMIN,
            spec,
            origin,
            agent_token,
            time_limit: TimeLimit::default(),
            volumes: Vec::new(),
        };
        self.store.insert_sandbox(new).unwrap();
        self.store.set_sandbox_state(&self.store.claim(id).unwrap(), state).unwrap();
        let directory = self.directory(id);
        std::fs::create_dir(&directory).unwrap();
        match saved {
            Saved::No => {}
            Saved::Yes => std::fs::create_dir(directory.join("snapshot")).unwrap(),
            Saved::Used => std::fs::create_dir(directory.join("snapshot.used")).unwrap(),
            Saved::Ran => std::fs::create_dir_all(directory.join("snapshot.used/ran")).unwrap(),
        }
        self.vms.leave(id, found);
        id
    }

    pub(crate) async fn recover(&self) -> Node {
        let path = self.data.path();
        let config = Config {
            sandboxes_dir: path.join("sandboxes"),
            images: ImageStore::new(path),
            registries: bhatti_registry::Config::default(),
            lohar: path.join("lohar"),
            boot_limit: Duration::from_secs(1),
            snapshots_dir: path.join("snapshots"),
            bases_dir: path.join("templates"),
            bases_bytes: 0,
            base_hostname: "template".parse().unwrap(),
            ready_vmms: 0,
            ready_forks: 0,
            memory_budget_mib: 4096,
            thermal: ThermalConfig {
                warm_after: Duration::from_secs(3600),
                cold_after: Duration::from_secs(3600),
            },
            volumes_dir: path.join("volumes"),
            network: NetworkConfig {
                host: Err("this is a test".to_owned()),
                range: "10.213.0.0/16".parse().unwrap(),
                reach_host: false,
            },
        };
        let engine: Arc<dyn Engine> = Arc::clone(&self.vms) as _;
        let node = Node::new(config, Arc::clone(&self.store), engine, Arc::new(NoControl));
        node.recover().await.unwrap().finished().await;
        node
    }
}
