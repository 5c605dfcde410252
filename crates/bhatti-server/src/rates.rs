//! Rate limits of users and of published ports.

use std::num::NonZeroU32;
use std::time::Duration;

use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use bhatti_api::ErrorCode;
use bhatti_types::{SandboxId, UserId};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

use crate::AppState;
use crate::auth::Caller;
use crate::status::ApiError;

/// Limit of a user's requests of one kind.
struct Rate {
    per_minute: NonZeroU32,
    burst: NonZeroU32,
}

const fn rate(per_minute: u32, burst: u32) -> Rate {
    match (NonZeroU32::new(per_minute), NonZeroU32::new(burst)) {
        (Some(per_minute), Some(burst)) => Rate { per_minute, burst },
        _ => panic!("a rate is not zero"),
    }
}

/// Creation of something that has memory or a disk.
const CREATE: Rate = rate(30, 10);
/// Use of a sandbox.
const USE: Rate = rate(600, 30);
/// Reads.
const READ: Rate = rate(1200, 60);
/// Requests to an application in a sandbox: one page may load a hundred resources.
const PROXY: Rate = rate(6000, 2000);

/// What a request does, as far as its rate is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Create,
    Use,
    Read,
    Port,
}

/// Number of counted sandboxes above which those without recent requests are dropped.
const SANDBOXES_KEPT: usize = 10_000;

/// The rate limiters. Only authenticated users are counted, so there are no more entries than
/// users. Published ports are counted by sandbox.
pub(crate) struct Rates {
    create: DefaultKeyedRateLimiter<UserId>,
    use_: DefaultKeyedRateLimiter<UserId>,
    read: DefaultKeyedRateLimiter<UserId>,
    proxy: DefaultKeyedRateLimiter<UserId>,
    public: DefaultKeyedRateLimiter<SandboxId>,
}

impl Default for Rates {
    fn default() -> Self {
        let quota =
            |Rate { per_minute, burst }: Rate| Quota::per_minute(per_minute).allow_burst(burst);
        Self {
            create: RateLimiter::keyed(quota(CREATE)),
            use_: RateLimiter::keyed(quota(USE)),
            read: RateLimiter::keyed(quota(READ)),
            proxy: RateLimiter::keyed(quota(PROXY)),
            public: RateLimiter::keyed(quota(PROXY)),
        }
    }
}

impl Rates {
    /// Counts a request to a published port of a sandbox, from any client. If the rate is
    /// exceeded, returns the time until the next request may come.
    pub(crate) fn check_public(&self, sandbox: SandboxId) -> Result<(), Duration> {
        if self.public.len() > SANDBOXES_KEPT {
            // A sandbox without recent requests has its full burst anyway.
            self.public.retain_recent();
        }
        let checked = self.public.check_key(&sandbox);
        checked.map_err(|until| until.wait_time_from(DefaultClock::default().now()))
    }

    /// Counts a request of another API: one that creates something with memory or a disk, a read,
    /// or a use.
    ///
    /// # Errors
    ///
    /// Returns an error if the user's rate is exceeded. The admin has none.
    pub(crate) fn check_kind(&self, user: UserId, kind: Kind) -> Result<(), ApiError> {
        if user == UserId::ADMIN {
            return Ok(());
        }
        let limiter = match kind {
            Kind::Create => &self.create,
            Kind::Use => &self.use_,
            Kind::Read => &self.read,
            Kind::Port => &self.proxy,
        };
        limiter.check_key(&user).map_err(|until| {
            let wait = until.wait_time_from(DefaultClock::default().now());
            ApiError::new(ErrorCode::RateLimited, "too many requests").retry_after(wait)
        })
    }

    /// Counts a request. If the rate is exceeded, returns the time until the next request may
    /// come.
    fn check(&self, user: UserId, method: &Method, route: &str) -> Result<(), Duration> {
        let limiter = match (method, route) {
            (_, route) if route.contains("/proxy/") => &self.proxy,
            (
                &Method::POST,
                "/sandboxes"
                | "/sandboxes/{sandbox}/fork"
                | "/sandboxes/{sandbox}/checkpoint"
                | "/snapshots/{snapshot}/resume"
                | "/images/build"
                | "/templates/build",
            ) => &self.create,
            (
                _,
                "/sandboxes/{sandbox}/ws"
                | "/sandboxes/{sandbox}/exec/ws"
                | "/sandboxes/{sandbox}/forward/{port}",
            ) => &self.use_,
            (&Method::GET | &Method::HEAD, _) => &self.read,
            _ => &self.use_,
        };
        limiter
            .check_key(&user)
            .map_err(|until| until.wait_time_from(DefaultClock::default().now()))
    }
}

/// Admits a request if its user is within the rate limit. The admin owns the machine and has no
/// limit.
pub(crate) fn limit(state: &AppState, request: Request) -> Result<Request, ApiError> {
    let caller = request.extensions().get::<Caller>().copied();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    if let (Some(caller), Some(route)) = (caller, route)
        && !caller.is_admin()
        && let Err(wait) = state.rates.check(caller.0, request.method(), &route)
    {
        return Err(ApiError::new(ErrorCode::RateLimited, "too many requests").retry_after(wait));
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_is_admitted_and_further_requests_are_limited() {
        let rates = Rates::default();
        let (alice, bob) = (UserId::from_entropy([1; 8]), UserId::from_entropy([2; 8]));
        let create = |user| rates.check(user, &Method::POST, "/sandboxes");

        assert_eq!((0..50).filter(|_| create(alice).is_ok()).count(), 10);
        let wait = create(alice).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(2), "{wait:?}");
        assert!(create(bob).is_ok());
        assert!(rates.check(alice, &Method::GET, "/sandboxes").is_ok());
    }
}
