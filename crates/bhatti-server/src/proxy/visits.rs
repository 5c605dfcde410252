//! Limits the requests of strangers to a sandbox. The guest agent has room for a thousand
//! operations, and the sandbox's owner needs some of them.

use std::collections::HashMap;
use std::sync::Arc;

use bhatti_types::SandboxId;
use parking_lot::Mutex;

/// Maximum number of requests in flight to the published ports of one sandbox.
const VISITS_MAX: usize = 512;

/// Number of requests in flight, by sandbox.
#[derive(Clone, Default)]
pub(crate) struct Visits(Arc<Mutex<HashMap<SandboxId, usize>>>);

/// One request, counted until this is dropped.
pub(crate) struct Visit {
    visits: Visits,
    sandbox: SandboxId,
}

impl Visits {
    /// Admits a request. Returns `None` if too many are in flight.
    pub(crate) fn enter(&self, sandbox: SandboxId) -> Option<Visit> {
        let mut visits = self.0.lock();
        let count = visits.entry(sandbox).or_default();
        if *count >= VISITS_MAX {
            return None;
        }
        *count += 1;
        drop(visits);
        Some(Visit { visits: self.clone(), sandbox })
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut visits = self.visits.0.lock();
        if let Some(count) = visits.get_mut(&self.sandbox) {
            *count -= 1;
            if *count == 0 {
                visits.remove(&self.sandbox);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visits_are_limited_and_released() {
        let visits = Visits::default();
        let (one, other) = (SandboxId::from_entropy([1; 8]), SandboxId::from_entropy([2; 8]));
        let all: Vec<_> = (0..VISITS_MAX).map(|_| visits.enter(one).unwrap()).collect();

        assert!(visits.enter(one).is_none() && visits.enter(other).is_some());
        drop(all);

        assert!(visits.enter(one).is_some() && visits.0.lock().is_empty());
    }
}
