//! Tickets: for a WebSocket's client that can set no header, good once and for a short time.

use std::collections::HashMap;
use std::time::Duration;

use bhatti_types::UserId;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::keys;

/// What every ticket begins with.
pub(crate) const PREFIX: &str = "bht-ticket_";

/// How long a ticket is good.
pub(crate) const GOOD_FOR: Duration = Duration::from_secs(30);

/// Tickets that may be out at once; beyond it the oldest are good no more.
const TICKETS_MAX: usize = 10_000;

/// The tickets that are out, by the hash of what they are.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<HashMap<[u8; 32], (UserId, Instant)>>);

impl Tickets {
    /// Draws a ticket.
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

    /// Makes all tickets of a user good for nothing.
    pub(crate) fn forget(&self, owner: UserId) {
        self.0.lock().retain(|_, (of, _)| *of != owner);
    }

    /// Takes a ticket, and returns whose it is.
    pub(crate) fn redeem(&self, ticket: &str) -> Option<UserId> {
        let (owner, until) = self.0.lock().remove(&keys::hash(ticket))?;
        (until > Instant::now()).then_some(owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ticket_is_good_once_and_for_a_while() {
        let tickets = Tickets::default();
        let (first, second) =
            (tickets.issue(UserId::ADMIN).unwrap(), tickets.issue(UserId::ADMIN).unwrap());

        assert_eq!(tickets.redeem(&first), Some(UserId::ADMIN));
        assert_eq!(tickets.redeem(&first), None);
        tokio::time::advance(GOOD_FOR).await;
        assert_eq!(tickets.redeem(&second), None);
    }
}
