//! The services that control offers the node: see [`ControlPlane`].

use std::collections::BTreeMap;
use std::sync::Arc;

use bhatti_node::ControlPlane;
use bhatti_store::Store;
use bhatti_types::{SandboxId, SecretName, UserId};
use serde_json::Value;

use crate::events::Events;
use crate::secrets::Secrets;

pub(crate) struct NodeServices {
    store: Arc<Store>,
    events: Arc<Events>,
    secrets: Arc<Secrets>,
}

impl NodeServices {
    pub(crate) const fn new(store: Arc<Store>, events: Arc<Events>, secrets: Arc<Secrets>) -> Self {
        Self { store, events, secrets }
    }
}

impl ControlPlane for NodeServices {
    fn record(&self, kind: &'static str, owner: UserId, sandbox: SandboxId, detail: Value) {
        let name = self.store.sandbox_name(sandbox).ok().flatten().unwrap_or_default();
        self.events.record(kind, owner, Some((sandbox, name)), detail);
    }

    fn secrets(&self, owner: UserId, names: &[SecretName]) -> BTreeMap<String, String> {
        self.secrets.read_existing(owner, names)
    }
}
