//! Network namespaces for tests.

use std::cell::Cell;

use bhatti_host::namespace;

use crate::tool::std_command;

thread_local! {
    static IS_OWN: Cell<bool> = const { Cell::new(false) };
}

/// Moves this thread, and the processes that it starts from now on, into a new network namespace
/// with only a loopback, so that bridges, taps and rules do not affect the host. Returns whether
/// the thread is in such a namespace: that needs root, and without root daemons change no network.
///
/// # Panics
///
/// Panics if the loopback cannot be brought up.
pub fn enter_own_network() -> bool {
    if IS_OWN.get() {
        return true;
    }
    if namespace::enter_own_network().is_err() {
        return false;
    }
    IS_OWN.set(true);
    assert!(std_command("ip", &["link", "set", "lo", "up"]), "the loopback can be brought up");
    true
}
