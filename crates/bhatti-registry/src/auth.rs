//! Authorization: basic, and bearer tokens from the server that a registry names.
//!
//! Source: the distribution project's specification of token authentication.

use std::collections::HashMap;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use http::{StatusCode, Uri};
use http_auth::{ChallengeRef, parse_challenges};
use parking_lot::Mutex;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use tokio::time::Instant;

use crate::config::authority;
use crate::error::RegistryError;
use crate::http::{Http, Wanted, read};

/// Maximum size of the response with a token, in bytes.
const TOKEN_BYTES_MAX: usize = 64 << 10;
/// How long a token is valid if its server does not say.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// How long a token is used at most.
const TOKEN_LIFE_MAX: Duration = Duration::from_hours(1);
/// How long before its end a token is no longer used.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);
/// Maximum number of tokens that are kept.
const TOKENS_MAX: usize = 256;

/// A user's name and password at a registry.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// The name.
    pub user: String,
    /// The password, or a token in its place.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Credentials {
    fn basic(&self) -> Option<HeaderValue> {
        let pair = BASE64_STANDARD.encode(format!("{}:{}", self.user, self.password));
        let mut value = HeaderValue::from_str(&format!("Basic {pair}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

/// What a request to a registry needs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Scope {
    pub(crate) registry: String,
    pub(crate) repository: String,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) access: Access,
}

/// What a request does to a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Pull,
    Push,
}

/// The authorizations that registries gave or ask for.
#[derive(Default)]
pub(crate) struct Authorizations(Mutex<HashMap<Scope, Authorization>>);

struct Authorization {
    value: HeaderValue,
    until: Option<Instant>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Authorizations {
    /// Returns what worked before.
    pub(crate) fn known(&self, scope: &Scope) -> Option<HeaderValue> {
        let mut known = self.0.lock();
        known.retain(|_, it| it.until.is_none_or(|until| until > Instant::now()));
        known.get(scope).map(|it| it.value.clone())
    }

    /// Forgets an authorization that the registry no longer accepts.
    pub(crate) fn forget(&self, scope: &Scope) {
        self.0.lock().remove(scope);
    }

    /// Gets the authorization that a registry asks for in a response with the status 401. Returns
    /// `None` if it asks for a name and a password, and there are none.
    pub(crate) async fn obtain(
        &self,
        http: &Http,
        scope: &Scope,
        headers: &HeaderMap,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let challenge = headers.get_all(WWW_AUTHENTICATE).iter().find_map(Challenge::parse);
        let (value, until) = match challenge {
            Some(Challenge::Bearer { realm, service }) => {
                let (token, life) = fetch_token(http, scope, &realm, service.as_deref()).await?;
                let value = HeaderValue::from_str(&format!("Bearer {token}"));
                let malformed =
                    |_| RegistryError::Malformed { what: "a token", host: scope.registry.clone() };
                let life = life.saturating_sub(TOKEN_MARGIN);
                (value.map_err(malformed)?, Some(Instant::now() + life))
            }
            Some(Challenge::Basic) | None => {
                let Some(basic) = scope.credentials.as_ref().and_then(Credentials::basic) else {
                    return Ok(None);
                };
                (basic, None)
            }
        };
        let mut known = self.0.lock();
        if known.len() >= TOKENS_MAX {
            known.clear();
        }
        known.insert(scope.clone(), Authorization { value: value.clone(), until });
        Ok(Some(value))
    }
}

enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    fn parse(value: &HeaderValue) -> Option<Self> {
        let challenges = parse_challenges(value.to_str().ok()?).ok()?;
        let parameter = |challenge: &ChallengeRef<'_>, name: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        challenges.iter().find_map(|challenge| {
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                let realm = parameter(challenge, "realm")?;
                return Some(Self::Bearer { realm, service: parameter(challenge, "service") });
            }
            challenge.scheme.eq_ignore_ascii_case("basic").then_some(Self::Basic)
        })
    }
}

async fn fetch_token(
    http: &Http,
    scope: &Scope,
    realm: &str,
    service: Option<&str>,
) -> Result<(String, Duration), RegistryError> {
    let malformed = |what| RegistryError::Malformed { what, host: scope.registry.clone() };
    let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let actions = match scope.access {
        Access::Pull => "pull",
        Access::Push => "pull,push",
    };
    let mut query = Vec::new();
    // A login alone wants no repository.
    if !scope.repository.is_empty() {
        let wanted = format!("repository:{}:{actions}", scope.repository);
        query.push(format!("scope={}", encode(&wanted)));
    }
    query.extend(service.map(|service| format!("service={}", encode(service))));
    let mark = if realm.contains('?') { '&' } else { '?' };
    let uri: Uri = format!("{realm}{mark}{}", query.join("&"))
        .parse()
        .ok()
        .filter(|uri: &Uri| uri.host().is_some() && uri.scheme().is_some())
        .ok_or_else(|| malformed("the address of tokens"))?;
    let host = authority(&uri).0;
    let authorization = scope.credentials.as_ref().and_then(Credentials::basic);
    let response = http.get(uri, &Wanted { authorization, ..Wanted::default() }).await?;
    let status = response.status();
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST)
    {
        return Err(RegistryError::Denied {
            registry: scope.registry.clone(),
            repository: scope.repository.clone(),
            has_credentials: scope.credentials.is_some(),
        });
    }
    if !status.is_success() {
        return Err(RegistryError::status(host, status, response.headers()));
    }
    let text = read(&host, response.into_body(), TOKEN_BYTES_MAX).await?;
    let token: Token = serde_json::from_slice(&text).map_err(|_| malformed("a token"))?;
    let life = token.expires_in.map_or(TOKEN_LIFE, Duration::from_secs).min(TOKEN_LIFE_MAX);
    let token = token.token.or(token.access_token).ok_or_else(|| malformed("a token"))?;
    Ok((token, life))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_parsed() {
        let parse = |text: &'static str| Challenge::parse(&HeaderValue::from_static(text));
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull""#;
        let Some(Challenge::Bearer { realm, service }) = parse(hub) else { panic!() };
        assert_eq!(realm, "https://auth.docker.io/token");
        assert_eq!(service.as_deref(), Some("registry.docker.io"));
        assert!(matches!(parse(r#"Basic realm="x""#), Some(Challenge::Basic)));
        assert!(matches!(parse(r#"bearer Realm="http://x""#), Some(Challenge::Bearer { .. })));
        assert!(parse("Negotiate").is_none());
        assert!(parse("Bearer").is_none());
    }

    #[test]
    fn password_is_not_printed() {
        let credentials = Credentials { user: "u".to_owned(), password: "secret".to_owned() };
        assert!(!format!("{credentials:?}").contains("secret"));
    }
}
