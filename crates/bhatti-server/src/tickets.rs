//! Tickets for WebSocket clients that cannot set headers. A ticket is valid once and for a short
//! time.

use std::collections::HashMap;
use std::time::Duration;

use bhatti_types::UserId;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::keys;

/// Prefix of every ticket.
pub(crate) const PREFIX: &str = "bht-ticket_";

/// Lifetime of a ticket.
pub(crate) const GOOD_FOR: Duration = Duration::from_secs(30);

/// Maximum number of unused tickets. Beyond it, the oldest become invalid.
const TICKETS_MAX: usize = 10_000;

/// The unused tickets, by their hash.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<HashMap<[u8; 32], (UserId, Instant)>>);

impl Tickets {
    /// Issues a ticket.
    pub(crate) fn issue(&self, owner: UserId) -> Result<String, getrandom::Error> {
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
        out.insert(keys::hash(&ticket), (owner, now + GOOD_FOR));
        Ok(ticket)
    }

    /// Invalidates all tickets of a user.
    pub(crate) fn forget(&self, owner: UserId) {
        self.0.lock().retain(|_, (of, _)| *of != owner);
    }

    /// Redeems a ticket, and returns its owner.
    pub(crate) fn redeem(&self, ticket: &str) -> Option<UserId> {
        let (owner, until) = self.0.lock().remove(&keys::hash(ticket))?;
        (until > Instant::now()).then_some(owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ticket_is_valid_once_and_expires() {
        let tickets = Tickets::default();
        let (first, second) =
            (tickets.issue(UserId::ADMIN).unwrap(), tickets.issue(UserId::ADMIN).unwrap());

        assert_eq!(tickets.redeem(&first), Some(UserId::ADMIN));
        assert_eq!(tickets.redeem(&first), None);
        tokio::time::advance(GOOD_FOR).await;
        assert_eq!(tickets.redeem(&second), None);
    }
}
