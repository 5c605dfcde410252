//! Tickets for WebSocket clients that cannot set headers. A ticket is valid once and for a short
//! time.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::identity::Identity;
use crate::keys;

/// Prefix of every ticket.
pub const PREFIX: &str = "bht-ticket_";

/// Lifetime of a ticket.
pub const GOOD_FOR: Duration = Duration::from_secs(30);

/// Maximum number of unused tickets. Beyond it, the oldest become invalid.
const TICKETS_MAX: usize = 10_000;

/// The unused tickets, by their hash.
#[derive(Debug, Default)]
pub struct Tickets(Mutex<HashMap<[u8; 32], (Identity, Instant)>>);

impl Tickets {
    /// Issues a ticket.
    ///
    /// # Errors
    ///
    /// Returns an error if the host provides no random bytes.
    pub fn issue(&self, identity: Identity) -> Result<String, getrandom::Error> {
        let ticket = PREFIX.to_owned() + &keys::random_hex()?;
        let now = Instant::now();
        let mut out = self.0.lock();
        out.retain(|_, (_, until)| *until > now);
        if out.len() >= TICKETS_MAX
            && let Some(oldest) =
                out.iter().min_by_key(|(_, (_, until))| *until).map(|(key, _)| *key)
        {
            out.remove(&oldest);
        }
        out.insert(keys::hash(&ticket), (identity, now + GOOD_FOR));
        Ok(ticket)
    }

    /// Redeems a ticket, and returns the caller that asked for it, whose key must still be valid.
    pub fn redeem(&self, ticket: &str) -> Option<Identity> {
        let (identity, until) = self.0.lock().remove(&keys::hash(ticket))?;
        (until > Instant::now() && identity.is_valid()).then_some(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ticket_is_valid_once_and_expires() {
        let tickets = Tickets::default();
        let (first, second) =
            (tickets.issue(Identity::ADMIN).unwrap(), tickets.issue(Identity::ADMIN).unwrap());

        assert!(tickets.redeem(&first).is_some());
        assert!(tickets.redeem(&first).is_none());
        tokio::time::advance(GOOD_FOR).await;
        assert!(tickets.redeem(&second).is_none());
    }
}
