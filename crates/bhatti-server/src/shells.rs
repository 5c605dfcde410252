//! Which terminal sessions have a client. All clients come through this daemon, so it knows without asking a guest.

use std::collections::HashSet;
use std::sync::Arc;

use bhatti_types::SandboxId;
use parking_lot::Mutex;

type Key = (SandboxId, String);

/// The sessions that have a client.
#[derive(Clone, Default)]
pub(crate) struct Shells(Arc<Mutex<HashSet<Key>>>);

/// A client's claim of a session, until it is dropped.
pub(crate) struct Claim {
    shells: Shells,
    key: Key,
}

impl Shells {
    /// Claims a session, unless somebody has it.
    pub(crate) fn claim(&self, sandbox: SandboxId, session: &str) -> Option<Claim> {
        let key = (sandbox, session.to_owned());
        let is_new = self.0.lock().insert(key.clone());
        is_new.then(|| Claim { shells: self.clone(), key })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shells.0.lock().remove(&self.key);
    }
}
