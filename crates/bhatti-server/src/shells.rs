//! Which terminal sessions have a client. All clients come through this daemon, so it knows without asking a guest.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bhatti_types::SandboxId;
use parking_lot::Mutex;

type Key = (SandboxId, String);

/// The sessions that have a client, and who is about to have one.
#[derive(Clone, Default)]
pub(crate) struct Shells {
    claimed: Arc<Mutex<HashSet<Key>>>,
    doors: Arc<Mutex<HashMap<SandboxId, Door>>>,
}

/// Held by who looks for a session of a sandbox, or makes one.
type Door = Arc<tokio::sync::Mutex<()>>;

/// A client's claim of a session, until it is dropped.
pub(crate) struct Claim {
    shells: Shells,
    key: Key,
}

impl Shells {
    /// The door of a sandbox.
    pub(crate) fn door(&self, sandbox: SandboxId) -> Door {
        let mut doors = self.doors.lock();
        doors.retain(|_, door| Arc::strong_count(door) > 1);
        Arc::clone(doors.entry(sandbox).or_default())
    }

    /// Claims a session, unless somebody has it.
    pub(crate) fn claim(&self, sandbox: SandboxId, session: &str) -> Option<Claim> {
        let key = (sandbox, session.to_owned());
        let is_new = self.claimed.lock().insert(key.clone());
        is_new.then(|| Claim { shells: self.clone(), key })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shells.claimed.lock().remove(&self.key);
    }
}
