//! When a guest was last heard. One that answers others is busy, however long this answer takes; one that says nothing to anybody hangs.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::CallError;

/// How many times as long as a guest that says nothing, one that is busy is waited for: so that a start and a request stay below the 90 s after
/// which a WebSocket that nobody reads meanwhile is taken for a dead one.
const BUSY_FACTOR: u32 = 4;

/// The last time that a guest said anything, in a frame of any stream; not in bytes of a forwarded port.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard(Arc<Mutex<Option<Instant>>>);

impl Heard {
    /// It says something right now.
    pub(crate) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn last(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an answer: for `limit` after the guest was last heard, and no more than [`BUSY_FACTOR`] times that in all.
    ///
    /// # Errors
    ///
    /// Returns [`CallError::Silent`] with the time for which it said nothing, or nothing to this; or the answer's own error.
    pub(crate) async fn within<T>(
        &self,
        limit: Duration,
        answer: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, CallError> {
        let began = Instant::now();
        let mut deadline = began + limit;
        let mut answer = pin!(answer);
        loop {
            if let Ok(answered) = timeout_at(deadline, answer.as_mut()).await {
                return answered;
            }
            let last = began + limit * BUSY_FACTOR;
            let later = self.last().map_or(deadline, |heard| heard + limit);
            if later <= deadline {
                return Err(CallError::Silent { limit });
            }
            if deadline >= last {
                return Err(CallError::Silent { limit: limit * BUSY_FACTOR });
            }
            deadline = later.min(last);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::sleep;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(15);

    /// How long a guest is waited for that answers after `answer`, if it does, and others every `others`, if it does.
    async fn waited(answer: Option<Duration>, others: Option<Duration>) -> (bool, Duration) {
        let heard = Heard::default();
        let began = Instant::now();
        let answer = async {
            match answer {
                Some(after) => sleep(after).await,
                None => pending().await,
            }
            Ok(())
        };
        let others = async {
            loop {
                match others {
                    Some(every) => sleep(every).await,
                    None => pending().await,
                }
                heard.note();
            }
        };
        tokio::select! {
            answered = heard.within(LIMIT, answer) => (answered.is_ok(), began.elapsed()),
            () = others => (false, Duration::MAX),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn guest_that_answers_others_is_waited_for_and_one_that_says_nothing_is_not() {
        let (late, often, seldom) = (LIMIT * 3, LIMIT / 4, LIMIT + LIMIT / 2);

        assert_eq!(waited(Some(LIMIT / 3), None).await, (true, LIMIT / 3));
        assert_eq!(waited(Some(late), None).await, (false, LIMIT));
        assert_eq!(waited(Some(late), Some(often)).await, (true, late));
        assert_eq!(waited(Some(late), Some(seldom)).await, (false, LIMIT));
        assert_eq!(waited(None, Some(often)).await, (false, LIMIT * BUSY_FACTOR));
    }
}
