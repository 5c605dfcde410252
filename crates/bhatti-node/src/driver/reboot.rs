//! Guests that reboot themselves: the VM ends, and the sandbox is booted again from its disk.
//!
//! VMMs end when their guest resets the machine. What the guest's kernel printed last tells a
//! reboot from everything else that ends a VM. The guest can print what it likes; that decides
//! about nothing but its own sandbox, and only so often.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What Linux prints before it resets the machine (`kernel/reboot.c`). A panic resets it without these words.
const RESTARTING: &str = "reboot: Restarting system";

/// How many reboots are followed by a boot within [`WITHIN`]: a guest that does nothing else would
/// keep a processor busy.
const REBOOTS_MAX: usize = 3;
const WITHIN: Duration = Duration::from_secs(600);

/// The reboots of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Reboots(Mutex<Vec<Instant>>);

impl Reboots {
    /// Whether a VM with this console's output is booted again.
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
