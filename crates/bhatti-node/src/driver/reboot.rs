//! Guests that reboot themselves: the VM ends, and the sandbox is booted again from its disk.
//!
//! VMMs end when their guest resets the machine. The last output of the guest's kernel tells a
//! reboot from everything else that ends a VM. The guest can print what it likes, but this affects
//! only its own sandbox, and at most [`REBOOTS_MAX`] times within [`WITHIN`].

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Text that Linux prints before it resets the machine (`kernel/reboot.c`). A panic resets the
/// machine without this text.
const RESTARTING: &str = "reboot: Restarting system";

/// How many reboots are followed by a boot within [`WITHIN`]: a guest that does nothing else would
/// keep a processor busy.
const REBOOTS_MAX: usize = 3;
const WITHIN: Duration = Duration::from_secs(600);

/// The reboots of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Reboots(Mutex<Vec<Instant>>);

impl Reboots {
    /// Returns whether a VM with this console output is booted again.
    pub(crate) fn admit(&self, console: &str) -> bool {
        if !console.contains(RESTARTING) {
            return false;
        }
        let mut reboots = self.0.lock();
        reboots.retain(|at| at.elapsed() < WITHIN);
        if reboots.len() >= REBOOTS_MAX {
            return false;
        }
        reboots.push(Instant::now());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn guest_that_reboots_is_booted_again_but_not_for_ever() {
        let reboots = Reboots::default();
        assert!(!reboots.admit("Kernel panic - not syncing"));
        let console = "[   12.3] reboot: Restarting system\n";
        assert!((0..3).all(|_| reboots.admit(console)));
        assert!(!reboots.admit(console));

        tokio::time::advance(WITHIN).await;

        assert!(reboots.admit(console));
    }
}
