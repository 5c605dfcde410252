//! The drivers that run, by sandbox.

use std::collections::HashMap;

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

    /// What `look` sees in one. It must not wait for anything.
    pub(crate) fn with<T>(&self, id: SandboxId, look: impl FnOnce(&Handle) -> T) -> Option<T> {
        self.0.lock().get(&id).map(look)
    }

    pub(crate) fn all(&self) -> Vec<Handle> {
        self.0.lock().values().cloned().collect()
    }

    pub(crate) fn for_each(&self, act: impl Fn(&Handle)) {
        self.0.lock().values().for_each(act);
    }

    pub(crate) fn insert(&self, id: SandboxId, handle: Handle) {
        self.0.lock().insert(id, handle);
    }

    pub(crate) fn remove(&self, id: SandboxId) {
        self.0.lock().remove(&id);
    }
}
