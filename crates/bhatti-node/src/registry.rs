//! The running drivers, by sandbox.

use std::collections::{HashMap, HashSet};

use bhatti_types::SandboxId;
use parking_lot::Mutex;

use crate::driver::Handle;

/// Holds the handle of every live sandbox.
#[derive(Default)]
pub(crate) struct Registry(Mutex<HashMap<SandboxId, Handle>>);

impl Registry {
    pub(crate) fn get(&self, id: SandboxId) -> Option<Handle> {
        self.0.lock().get(&id).cloned()
    }

    /// Calls `look` with the handle of a sandbox, if there is one. `look` must not block.
    pub(crate) fn with<T>(&self, id: SandboxId, look: impl FnOnce(&Handle) -> T) -> Option<T> {
        self.0.lock().get(&id).map(look)
    }

    pub(crate) fn all(&self) -> Vec<Handle> {
        self.0.lock().values().cloned().collect()
    }

    /// Returns the least recently used warm sandbox that is not in `but`.
    pub(crate) fn longest_idle(&self, but: &HashSet<SandboxId>) -> Option<(SandboxId, Handle)> {
        let handles = self.0.lock();
        let others = handles.iter().filter(|(id, _)| !but.contains(id));
        let idle =
            others.filter_map(|(id, handle)| Some((handle.access.idle_since()?, id, handle)));
        let longest = idle.min_by_key(|(since, ..)| *since);
        longest.map(|(_, id, handle)| (*id, handle.clone()))
    }

    pub(crate) fn insert(&self, id: SandboxId, handle: Handle) {
        self.0.lock().insert(id, handle);
    }

    pub(crate) fn remove(&self, id: SandboxId) {
        self.0.lock().remove(&id);
    }
}
