//! Record of the terminal sessions that have a client. All clients come through this daemon, so
//! the daemon knows them without a request to a guest.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bhatti_types::SandboxId;
use parking_lot::Mutex;

type Key = (SandboxId, String);

/// The sessions that have a client, and a lock for each sandbox in which a client attaches.
#[derive(Clone, Default)]
pub(crate) struct Shells {
    claimed: Arc<Mutex<HashSet<Key>>>,
    doors: Arc<Mutex<HashMap<SandboxId, Door>>>,
}

/// Lock that a client holds while it looks for a session of a sandbox, or creates one.
type Door = Arc<tokio::sync::Mutex<()>>;

/// A client's claim to a session, until it is dropped.
pub(crate) struct Claim {
    shells: Shells,
    key: Key,
}

impl Shells {
    /// Returns the lock of a sandbox.
    pub(crate) fn door(&self, sandbox: SandboxId) -> Door {
        let mut doors = self.doors.lock();
        doors.retain(|_, door| Arc::strong_count(door) > 1);
        Arc::clone(doors.entry(sandbox).or_default())
    }

    /// Claims a session. Returns `None` if another client has claimed it.
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
