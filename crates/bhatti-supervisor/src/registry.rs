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

    pub(crate) fn insert(&self, id: SandboxId, handle: Handle) {
        self.0.lock().insert(id, handle);
    }

    pub(crate) fn remove(&self, id: SandboxId) {
        self.0.lock().remove(&id);
    }
}
