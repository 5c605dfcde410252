//! Asks registries.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode, Uri};
use hyper::body::Incoming;
use tokio::time::timeout;

use crate::auth::{Access, Authorizations, Credentials, Scope};
use crate::config::{Config, authority};
use crate::error::RegistryError;
use crate::http::{Http, HttpError, Sent, Wanted, read};
use crate::image::{
    Blob, DESCRIPTION_BYTES_MAX, Description, MANIFESTS, RemoteImage, digest_of, parse,
};
use crate::reference::{Reference, server};
use crate::retry::Attempts;

/// Time limit for a registry to accept or refuse a login.
const LOGIN_LIMIT: Duration = Duration::from_secs(30);
/// The header with the digest of a manifest.
const DIGEST: &str = "docker-content-digest";

/// A client of all registries. Clones share its connections and tokens.
#[derive(Clone)]
pub struct Registries {
    http: Http,
    config: Arc<Config>,
    known: Arc<Authorizations>,
}

/// A registry that has an image: the reference's own one, or a mirror.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// The server's name, with its port if it is not the usual one.
    server: String,
    scope: Scope,
    /// Parameters of requests to a mirror, which may serve several registries.
    query: String,
}

impl Registries {
    /// Makes a client.
    ///
    /// # Errors
    ///
    /// Returns an error if this machine has no certificate authorities. Blocks on disk.
    pub fn new(config: Config) -> io::Result<Self> {
        let config = Arc::new(config);
        let http = Http::new(Arc::clone(&config))?;
        Ok(Self { http, config, known: Arc::default() })
    }

    /// Asks a registry once whether it accepts credentials: a user waits for the answer. A registry
    /// that asks for none accepts all.
    ///
    /// # Errors
    ///
    /// Returns [`RegistryError::Denied`] if it does not, and another error if it cannot be asked
    /// within 30 s.
    pub async fn check_login(
        &self,
        registry: &str,
        credentials: &Credentials,
    ) -> Result<(), RegistryError> {
        let scope = Scope {
            registry: registry.to_owned(),
            repository: String::new(),
            credentials: Some(credentials.clone()),
            access: Access::Pull,
        };
        // A password that was accepted once may have been changed.
        self.known.forget(&scope);
        let server = server(registry).to_owned();
        let own = Source { server, scope, query: String::new() };
        let asked = timeout(LOGIN_LIMIT, self.get(&own, "", Wanted::default())).await;
        asked.map_err(|_| HttpError::timed_out(registry))?.map(drop)
    }

    /// Finds the image of a reference for this host.
    ///
    /// # Errors
    ///
    /// Returns an error that names the registry. Transient failures are retried before; a registry
    /// that cannot be connected to is tried for some seconds only.
    pub async fn find(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Result<RemoteImage, RegistryError> {
        let mut attempts = self.attempts(reference, credentials).of_first_contact();
        loop {
            match self.find_at(reference, attempts.server()).await {
                Ok(image) => return Ok(image),
                Err(error) => attempts.next_after(error).await?,
            }
        }
    }

    async fn find_at(
        &self,
        reference: &Reference,
        source: &Source,
    ) -> Result<RemoteImage, RegistryError> {
        let found = self.describe(reference, source, reference.version()).await?;
        let digest = match found {
            Description::Image(image) => return Ok(image),
            Description::Index(digest) => digest,
        };
        match self.describe(reference, source, &digest).await? {
            Description::Image(image) => Ok(image),
            Description::Index(_) => Err(RegistryError::Unsupported {
                reference: reference.to_string(),
                problem: "has an index in its index".to_owned(),
            }),
        }
    }

    /// Reads the configuration of an image: a JSON object of at most 4 MiB.
    ///
    /// # Errors
    ///
    /// Returns an error if the content has not the digest that the image names.
    pub async fn config(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
        blob: &Blob,
    ) -> Result<Bytes, RegistryError> {
        let mut attempts = self.attempts(reference, credentials);
        loop {
            match self.config_at(attempts.server(), blob).await {
                Ok(config) => return Ok(config),
                Err(error) => attempts.next_after(error).await?,
            }
        }
    }

    async fn config_at(&self, source: &Source, blob: &Blob) -> Result<Bytes, RegistryError> {
        let response = self.blob(source, blob, 0).await?;
        let content = read(&source.server, response.into_body(), DESCRIPTION_BYTES_MAX).await?;
        check(source, &content, &blob.digest()).map(|()| content)
    }

    /// Sends a request for a blob, from byte `from` on.
    pub(crate) async fn blob(
        &self,
        source: &Source,
        blob: &Blob,
        from: u64,
    ) -> Result<Response<Incoming>, RegistryError> {
        let wanted = Wanted { from, ..Wanted::default() };
        self.get(source, &format!("blobs/{}", blob.digest()), wanted).await
    }

    /// Prepares to ask the mirrors of a reference's registry, and then the registry.
    pub(crate) fn attempts(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Attempts<Source> {
        let registry = reference.registry();
        let repository = reference.repository().to_owned();
        let mirrors = self.config.of(registry).mirrors.into_iter().map(|mirror| Source {
            server: mirror.clone(),
            // A mirror does not get the password of the registry.
            scope: Scope {
                registry: mirror,
                repository: repository.clone(),
                credentials: None,
                access: Access::Pull,
            },
            query: format!("?ns={registry}"),
        });
        let own = own_source(reference, credentials, Access::Pull);
        Attempts::new(mirrors.collect(), own)
    }

    /// Prepares to ask a reference's registry alone, to push.
    pub(crate) fn own_attempts(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Attempts<Source> {
        Attempts::new(Vec::new(), own_source(reference, credentials, Access::Push))
    }

    /// Returns the URI of a path below a repository.
    pub(crate) fn uri(&self, source: &Source, path: &str) -> Result<Uri, RegistryError> {
        let Source { server, scope, query } = source;
        let scheme = if self.config.of(server).plain_http { "http" } else { "https" };
        let below = match scope.repository.as_str() {
            "" => String::new(),
            repository => format!("{repository}/{path}"),
        };
        let uri = format!("{scheme}://{server}/v2/{below}{query}");
        uri.parse().map_err(|_| RegistryError::NotFound(uri))
    }

    /// Sends a request that pushes, with authorization if the registry asks for it. A body is sent
    /// once: an upload begins with a request without one.
    pub(crate) async fn send(
        &self,
        source: &Source,
        method: Method,
        uri: Uri,
        headers: Vec<(HeaderName, HeaderValue)>,
        sent: Option<Sent>,
    ) -> Result<Response<Incoming>, RegistryError> {
        let scope = &source.scope;
        let authorized = |authorization: Option<HeaderValue>| {
            // Another host, which keeps the blobs, does not get the authorization.
            let is_own = authority(&uri) == self.authority_of(source);
            let authorization = authorization.filter(|_| is_own);
            let all = headers.clone().into_iter();
            all.chain(authorization.map(|value| (AUTHORIZATION, value))).collect::<Vec<_>>()
        };
        let is_short = sent.is_none();
        let known = self.known.known(scope);
        let mut response =
            self.http.send(method.clone(), uri.clone(), authorized(known), sent).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.known.forget(scope);
            let obtained = self.known.obtain(&self.http, scope, response.headers()).await?;
            let obtained = obtained.ok_or_else(|| denied(scope))?;
            if is_short {
                response =
                    self.http.send(method, uri.clone(), authorized(Some(obtained)), None).await?;
            }
        }
        judge(source, uri.path(), response)
    }

    fn authority_of(&self, source: &Source) -> (String, u16) {
        self.uri(source, "").map(|uri| authority(&uri)).unwrap_or_default()
    }

    async fn describe(
        &self,
        reference: &Reference,
        source: &Source,
        version: &str,
    ) -> Result<Description, RegistryError> {
        let wanted = Wanted { accept: Some(MANIFESTS), ..Wanted::default() };
        let response = self.get(source, &format!("manifests/{version}"), wanted).await?;
        let named = header(response.headers(), DIGEST);
        let content = read(&source.server, response.into_body(), DESCRIPTION_BYTES_MAX).await?;
        if version.starts_with("sha256:") {
            check(source, &content, version)?;
        }
        // A registry may name a digest of another algorithm.
        if let Some(named) = named.filter(|named| named.starts_with("sha256:")) {
            check(source, &content, &named)?;
        }
        parse(&reference.to_string(), &source.server, &content)
    }

    /// Sends a request below a repository, with authorization if the registry asks for it.
    async fn get(
        &self,
        source: &Source,
        path: &str,
        mut wanted: Wanted<'_>,
    ) -> Result<Response<Incoming>, RegistryError> {
        let scope = &source.scope;
        let uri = self.uri(source, path)?;
        let known = self.known.known(scope);
        wanted.authorization = known;
        let mut response = self.http.get(uri.clone(), &wanted).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            // A token that has expired before its time is replaced once.
            self.known.forget(scope);
            let obtained = self.known.obtain(&self.http, scope, response.headers()).await?;
            wanted.authorization = Some(obtained.ok_or_else(|| denied(scope))?);
            response = self.http.get(uri, &wanted).await?;
        }
        judge(source, path, response)
    }
}

/// Returns a response, or what its status means.
fn judge(
    source: &Source,
    path: &str,
    response: Response<Incoming>,
) -> Result<Response<Incoming>, RegistryError> {
    let Source { server, scope, .. } = source;
    match response.status() {
        status if status.is_success() => Ok(response),
        StatusCode::NOT_FOUND => Err(RegistryError::NotFound(format!(
            "{}/{} ({path})",
            scope.registry, scope.repository
        ))),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(denied(scope)),
        status => Err(RegistryError::status(server.clone(), status, response.headers())),
    }
}

/// Returns a reference's registry.
fn own_source(reference: &Reference, credentials: Option<&Credentials>, access: Access) -> Source {
    Source {
        server: server(reference.registry()).to_owned(),
        scope: Scope {
            registry: reference.registry().to_owned(),
            repository: reference.repository().to_owned(),
            credentials: credentials.cloned(),
            access,
        },
        query: String::new(),
    }
}

impl Source {
    pub(crate) fn server(&self) -> &str {
        &self.server
    }
}

fn denied(scope: &Scope) -> RegistryError {
    RegistryError::Denied {
        registry: scope.registry.clone(),
        repository: scope.repository.clone(),
        has_credentials: scope.credentials.is_some(),
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// Compares a content with its digest, `sha256:…`.
fn check(source: &Source, content: &[u8], digest: &str) -> Result<(), RegistryError> {
    if digest_of(content) == digest {
        return Ok(());
    }
    Err(RegistryError::WrongContent { registry: source.server.clone(), digest: digest.to_owned() })
}
