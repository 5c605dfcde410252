//! A sandbox that cannot be woken is not tried by every request: each try starts a VMM and reads a memory, only to fail again.
//!
//! After a few failures in a row, requests are told the last one at once, and one of them tries again now and then. Whoever starts the sandbox
//! explicitly always gets a try.

use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::RestoreError;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::driver::TransitionError;

/// Failures in a row after which requests try no more.
const FAILURES_MAX: u32 = 3;

/// How long after a failure one of them tries again.
const REST: Duration = Duration::from_secs(30);

/// What came of the last tries to wake a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Breaker {
    failed: Mutex<Option<Failed>>,
}

#[derive(Debug)]
struct Failed {
    times: u32,
    last: Instant,
    error: Arc<RestoreError>,
}

impl Breaker {
    /// Whether a request may try.
    pub(crate) fn admit(&self) -> Result<(), TransitionError> {
        let failed = self.failed.lock();
        let Some(Failed { times, last, error }) = &*failed else { return Ok(()) };
        let wait = REST.saturating_sub(last.elapsed());
        if *times < FAILURES_MAX || wait.is_zero() {
            return Ok(());
        }
        Err(TransitionError::GivenUp { times: *times, wait, error: Arc::clone(error) })
    }

    /// Notes what came of a try. What says nothing of the snapshot (a host without memory for it, say) leaves the count as it is.
    pub(crate) fn note(&self, woken: &Result<(), TransitionError>) {
        let mut failed = self.failed.lock();
        match woken {
            Ok(()) => *failed = None,
            Err(TransitionError::Restore(error)) => {
                let times = failed.as_ref().map_or(1, |before| before.times.saturating_add(1));
                *failed = Some(Failed { times, last: Instant::now(), error: Arc::clone(error) });
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damaged() -> Result<(), TransitionError> {
        Err(RestoreError::Stale.into())
    }

    #[tokio::test(start_paused = true)]
    async fn third_failure_in_a_row_gives_requests_a_rest_and_one_of_them_another_try_after_it() {
        let breaker = Breaker::default();
        for _ in 0..FAILURES_MAX {
            breaker.admit().unwrap();
            breaker.note(&damaged());
        }

        let refused = breaker.admit().unwrap_err();
        assert!(matches!(refused, TransitionError::GivenUp { times: 3, wait: REST, .. }));
        tokio::time::advance(REST).await;
        breaker.admit().unwrap();
        breaker.note(&damaged());
        breaker.admit().unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn success_forgets_the_failures_and_what_is_no_failure_to_restore_does_not_count() {
        let breaker = Breaker::default();
        for woken in [damaged(), damaged(), Err(TransitionError::Restless), Ok(()), damaged()] {
            breaker.note(&woken);
            breaker.admit().unwrap();
        }
    }
}
