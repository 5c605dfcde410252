//! Repeats requests that may succeed later.

use std::time::Duration;

use tracing::debug;

use crate::error::RegistryError;

/// Number of attempts. The waits between them sum up to about 30 s.
const ATTEMPTS: u32 = 7;
/// Number of attempts to connect before a registry has answered anything. It is more likely that
/// there is none, or no network, than that it comes back, and a user waits.
const CONNECTS: u32 = 3;
/// The first wait. Each wait is twice as long as the one before it.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Maximum of a wait that a registry may ask for.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// The attempts of one operation at the servers that it may ask, in order. A server that is not
/// the last one is asked once.
pub(crate) struct Attempts<S> {
    servers: std::vec::IntoIter<S>,
    current: S,
    failures: u32,
    /// Number of attempts if there is no connection.
    connects: u32,
}

impl<S> Attempts<S> {
    /// Begins with the first of `servers`, or with `last` if there is none before it.
    pub(crate) fn new(servers: Vec<S>, last: S) -> Self {
        let mut servers: Vec<S> = servers.into_iter().chain([last]).collect();
        let current = servers.remove(0);
        Self { servers: servers.into_iter(), current, failures: 0, connects: ATTEMPTS }
    }

    /// Gives up soon if the last server cannot be connected to: nothing has answered yet.
    pub(crate) fn of_first_contact(self) -> Self {
        Self { connects: CONNECTS, ..self }
    }

    /// The server to ask now.
    pub(crate) fn server(&self) -> &S {
        &self.current
    }

    /// Waits until the next attempt after `error`.
    ///
    /// # Errors
    ///
    /// Returns `error` if it was the last attempt.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub(crate) async fn next_after(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        if let Some(next) = self.servers.next() {
            debug!(%error, "A mirror failed");
            self.current = next;
            return Ok(());
        }
        if !error.is_unconnected() {
            self.connects = ATTEMPTS;
        }
        if !error.is_transient() || self.failures + 1 >= self.connects {
            return Err(error);
        }
        let wait = wait(&error, self.failures);
        debug!(%error, ?wait, "A request to a registry is repeated");
        tokio::time::sleep(wait).await;
        self.failures += 1;
        Ok(())
    }
}

fn wait(error: &RegistryError, failures: u32) -> Duration {
    let usual = FIRST_WAIT * 2_u32.pow(failures);
    // Requests that failed together do not come back together.
    let usual = usual.mul_f64(fastrand::f64().mul_add(0.5, 0.75));
    error.retry_after().map_or(usual, |asked| asked.max(usual)).min(WAIT_MAX)
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};

    use super::*;
    use crate::connect::ConnectError;
    use crate::http::HttpError;

    fn busy(seconds: Option<&'static str>) -> RegistryError {
        let mut headers = HeaderMap::new();
        if let Some(seconds) = seconds {
            headers.insert("retry-after", seconds.parse().unwrap());
        }
        RegistryError::status("r".to_owned(), StatusCode::TOO_MANY_REQUESTS, &headers)
    }

    fn unconnected() -> RegistryError {
        let source = std::sync::Arc::new(std::io::ErrorKind::ConnectionRefused.into());
        HttpError::Connect(ConnectError::Failed { host: "r".to_owned(), source }).into()
    }

    fn missing() -> RegistryError {
        RegistryError::NotFound("x".to_owned())
    }

    #[test]
    fn waits_grow_and_follow_the_registry_up_to_a_limit() {
        assert!(wait(&busy(None), 3) > wait(&busy(None), 0));
        assert_eq!(wait(&busy(Some("20")), 0), Duration::from_secs(20));
        assert_eq!(wait(&busy(Some("86400")), 0), WAIT_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_end_with_a_lasting_error_or_the_last_one() {
        let mut attempts = Attempts::new(vec![], 'a');
        assert!(attempts.next_after(missing()).await.is_err());

        let mut attempts = Attempts::new(vec![], 'a');
        for _ in 1..ATTEMPTS {
            attempts.next_after(busy(None)).await.unwrap();
        }
        assert!(attempts.next_after(busy(None)).await.unwrap_err().to_string().contains("429"));
    }

    #[tokio::test(start_paused = true)]
    async fn first_contact_is_given_up_soon_if_nothing_answers() {
        let mut attempts = Attempts::new(vec![], 'a').of_first_contact();
        for _ in 1..CONNECTS {
            attempts.next_after(unconnected()).await.unwrap();
        }
        assert!(attempts.next_after(unconnected()).await.is_err());

        let mut attempts = Attempts::new(vec![], 'a').of_first_contact();
        // A registry that has answered is tried as often as any other.
        attempts.next_after(busy(None)).await.unwrap();
        for _ in 2..ATTEMPTS {
            attempts.next_after(unconnected()).await.unwrap();
        }
        assert!(attempts.next_after(unconnected()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn next_server_is_asked_after_any_error() {
        let mut attempts = Attempts::new(vec!['a', 'b'], 'c');
        assert_eq!(*attempts.server(), 'a');
        attempts.next_after(missing()).await.unwrap();
        assert_eq!(*attempts.server(), 'b');
        attempts.next_after(busy(None)).await.unwrap();
        assert_eq!(*attempts.server(), 'c');
        assert!(attempts.next_after(missing()).await.is_err());
    }
}
