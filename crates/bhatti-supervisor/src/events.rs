//! What happened, on record, and told to whoever listens.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_store::{EventFilter, EventRow, NewEvent, Store, StoreError};
use bhatti_types::{Report, SandboxId, UserId};
use serde_json::Value;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::Supervisor;

/// How many events of each user are kept, and how long.
const KEPT_MAX: u64 = 100_000;
const KEPT_FOR: Duration = Duration::from_secs(90 * 24 * 3600);

/// How often old ones are removed.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Events are written where they happen, so none that was told is lost; listeners read them from the store, so none is too slow.
pub(crate) struct Events {
    store: Arc<Store>,
    latest: watch::Sender<u64>,
}

impl Events {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Self { store, latest: watch::Sender::new(0) }
    }

    /// Records an event. One that cannot be is no reason for what happened to fail.
    pub(crate) fn record(
        &self,
        kind: &'static str,
        owner: UserId,
        sandbox: Option<(SandboxId, String)>,
        detail: Value,
    ) {
        match self.store.insert_event(&NewEvent { kind, owner, sandbox, detail }) {
            Ok(id) => drop(self.latest.send_replace(id)),
            Err(error) => warn!(kind, error = %Report(&error), "Failed to record an event"),
        }
    }
}

impl Supervisor {
    /// Records something that happened beside the sandboxes' lives.
    pub fn record(
        &self,
        kind: &'static str,
        owner: UserId,
        sandbox: Option<(SandboxId, String)>,
        detail: Value,
    ) {
        self.shared.events.record(kind, owner, sandbox, detail);
    }

    /// The events that a filter lets through, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_events(&self, filter: &EventFilter) -> Result<Vec<EventRow>, StoreError> {
        self.shared.store.list_events(filter)
    }

    /// Changes whenever there is another event.
    #[must_use]
    pub fn watch_events(&self) -> watch::Receiver<u64> {
        self.shared.events.latest.subscribe()
    }

    /// Removes old events now and then, for as long as the daemon runs.
    pub async fn prune_events(self) {
        loop {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let before = since.saturating_sub(KEPT_FOR);
            match self.shared.store.prune_events(KEPT_MAX, before) {
                Ok(0) => {}
                Ok(pruned) => info!(pruned, "Old events were removed"),
                Err(error) => warn!(error = %Report(&error), "Failed to remove old events"),
            }
            tokio::time::sleep(PRUNE_EVERY).await;
        }
    }
}
