//! A network of a test's own.

use std::cell::Cell;

use bhatti_host::namespace;

use crate::daemon::std_command;

thread_local! {
    static IS_OWN: Cell<bool> = const { Cell::new(false) };
}

/// Gives this thread, and what it starts from now on, a network of their own with nothing but a loopback in it, so that bridges, taps and rules
/// reach nothing of the machine's. Returns whether it has one: that needs root, and without root no daemon changes a network either.
///
/// # Panics
///
/// Panics if its loopback cannot be brought up.
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
