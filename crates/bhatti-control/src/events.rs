//! The log of events. Listeners wait for a new number and read the store from where they are.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_store::{EventFilter, EventRow, NewEvent, Store, StoreError};
use bhatti_types::{Report, SandboxId, UserId};
use serde_json::Value;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::Control;

/// How many events of a user are kept, and for how long.
const KEPT_MAX: u64 = 100_000;
const KEPT_FOR: Duration = Duration::from_secs(90 * 24 * 3600);

/// The interval between two removals of old events.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Writes events, and wakes their listeners.
pub(crate) struct Events {
    store: Arc<Store>,
    /// The number of the latest event.
    latest: watch::Sender<u64>,
}

impl Events {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Self { store, latest: watch::Sender::new(0) }
    }

    /// Records an event. If the store fails, the event is lost and the failure is logged: the
    /// action has happened already.
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

impl Control {
    /// Returns the events that a filter selects, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_events(&self, filter: &EventFilter) -> Result<Vec<EventRow>, StoreError> {
        self.inner.store.list_events(filter)
    }

    /// Returns a channel that changes with each new event.
    #[must_use]
    pub fn watch_events(&self) -> watch::Receiver<u64> {
        self.inner.events.latest.subscribe()
    }

    /// Removes old events once an hour, for as long as the future is polled.
    pub async fn prune_events(self) {
        loop {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let before = since.saturating_sub(KEPT_FOR);
            match self.inner.store.prune_events(KEPT_MAX, before) {
                Ok(0) => {}
                Ok(pruned) => info!(pruned, "Removed old events"),
                Err(error) => warn!(error = %Report(&error), "Failed to remove old events"),
            }
            tokio::time::sleep(PRUNE_EVERY).await;
        }
    }
}
