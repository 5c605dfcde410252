//! Circuit breaker for wakes. If a sandbox cannot be woken, not every request tries: each attempt
//! starts a VMM and reads a memory, only to fail again.
//!
//! After a few failures in a row, requests get the last error at once, and one of them tries again
//! from time to time. An explicit start always tries.

use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::RestoreError;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::error::TransitionError;

/// Number of failures in a row after which requests stop trying.
const FAILURES_MAX: u32 = 3;

/// Time after a failure until a request tries again.
const REST: Duration = Duration::from_secs(30);

/// The results of the last attempts to wake a sandbox.
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
    /// Returns an error if a request must not try now.
    pub(crate) fn admit(&self) -> Result<(), TransitionError> {
        let failed = self.failed.lock();
        let Some(Failed { times, last, error }) = &*failed else { return Ok(()) };
        let wait = REST.saturating_sub(last.elapsed());
        if *times < FAILURES_MAX || wait.is_zero() {
            return Ok(());
        }
        Err(TransitionError::GivenUp { times: *times, wait, error: Arc::clone(error) })
    }

    /// Records the result of an attempt. An error that says nothing about the snapshot (no free
    /// memory on the host, for example) leaves the count unchanged.
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
