//! The API of E2B's SDKs, on bhatti's sandboxes.
//!
//! Two parts answer a request. The control plane (`api`) creates and changes sandboxes for the
//! owner of an API key. The sandbox side (`envd`) serves the processes and files of one sandbox to
//! clients that have the sandbox's access token. Other ports of a sandbox are plain HTTP, which the
//! server relays.
//!
//! The server identifies keys, counts rates and requests, and calls this crate. What the SDKs
//! expect was found by running them.

mod api;
mod code;
mod connect;
mod envd;
mod error;
mod load;
mod place;
mod settings;
mod status;
mod templates;
mod token;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bhatti_control::{Control, CreateError, ForkError, OperationFailure, SnapshotOpError};
use bhatti_edge::Identity;
use bhatti_node::{SandboxUse, UseError};
use bhatti_store::{SandboxRow, StoreError};
use bhatti_types::{SandboxId, SandboxState};
use parking_lot::Mutex;
use tokio::time::Instant;
use tower_service::Service as _;

pub use error::Error;
pub use place::{ENVD_PORT, Place, key};

use load::Load;
use settings::Settings;
use templates::Builds;
use templates::uploads::{ArchiveOf, Uploads};

/// How the native API describes errors. Both APIs answer the same failures alike.
pub trait Describe: Send + Sync {
    /// A failed creation.
    fn creation(&self, error: CreateError) -> Error;
    /// A sandbox that cannot be used.
    fn using(&self, error: UseError) -> Error;
    /// A failed fork.
    fn fork(&self, error: ForkError) -> Error;
    /// A failed operation on a snapshot.
    fn snapshot(&self, error: SnapshotOpError) -> Error;
    /// A failed operation.
    fn operation(&self, error: OperationFailure) -> Error;
    /// A failed query.
    fn store(&self, error: StoreError) -> Error;
}

/// The API.
#[derive(Clone)]
pub struct E2b(Arc<Inner>);

/// The longest query of a signed URL, in bytes.
const QUERY_BYTES_MAX: usize = 16 << 10;

/// How old the list of tokens must be before it is read again.
const TOKENS_AGE: Duration = Duration::from_secs(1);

/// The access tokens of all sandboxes.
#[derive(Default)]
struct Tokens {
    all: Vec<(SandboxId, String)>,
    read_at: Option<Instant>,
}

struct Inner {
    control: Control,
    tokens: Mutex<Tokens>,
    describe: Box<dyn Describe>,
    /// Host names of sandboxes' ports are below this domain.
    zone: Option<String>,
    watchers: envd::Watchers,
    builds: Builds,
    uploads: Uploads,
}

/// A sandbox that a request reaches, with its lease.
#[derive(Clone)]
pub struct Target {
    /// Its row.
    pub row: Arc<SandboxRow>,
    settings: Arc<Settings>,
    /// The lease. The sandbox stays hot as long as a clone of it lives.
    pub used: Arc<SandboxUse>,
}

/// An upload of files for the steps of a template.
pub struct Upload(Identity, String);

impl Upload {
    /// The user whose files they are, and the key that asked for the link. The upload ends with the
    /// key.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.0
    }
}

impl E2b {
    /// Creates the API of a daemon.
    #[must_use]
    pub fn new(control: Control, describe: Box<dyn Describe>, zone: Option<String>) -> Self {
        Self(Arc::new(Inner {
            control,
            tokens: Mutex::default(),
            describe,
            zone,
            watchers: envd::Watchers::default(),
            builds: Builds::default(),
            uploads: Uploads::default(),
        }))
    }

    /// Answers a request to the control plane. Tokens of existing sandboxes, and links for
    /// uploads, are only in answers to keys that may control sandboxes.
    pub async fn control_plane(&self, identity: &Identity, mut request: Request) -> Response {
        request.extensions_mut().insert(api::Caller(identity.clone()));
        let mut routes = api::router().with_state(self.clone());
        // A router never fails.
        routes.call(request).await.unwrap_or_else(|never| match never {})
    }

    /// Finds the sandbox of a request.
    ///
    /// # Errors
    ///
    /// Returns the answer that SDKs take for a sandbox that is gone.
    pub fn find(&self, id: &str) -> Result<SandboxRow, Error> {
        let gone = || Error::no_sandbox(id);
        let parsed = id.parse().map_err(|_| gone())?;
        let row = self.0.control.find_any(parsed);
        row.map_err(|error| self.0.describe.store(error))?.ok_or_else(gone)
    }

    /// Whether a request has a token or a signature of this sandbox's processes and files.
    #[must_use]
    pub fn is_known(&self, row: &SandboxRow, request: &Request) -> bool {
        envd::authenticate(row, request).is_ok()
    }

    /// Wakes a sandbox. One that is paused is started if it was created so.
    ///
    /// # Errors
    ///
    /// Returns the answers that SDKs take for a sandbox that is gone, and the errors of a sandbox
    /// that cannot be woken.
    pub async fn enter(&self, row: SandboxRow) -> Result<Target, Error> {
        let (id, settings) = (row.id.to_string(), Settings::of(&row));
        if row.state == SandboxState::Stopped && settings.auto_resume {
            api::resume(self, &row, &settings, None).await?;
        }
        let entered = self.0.control.enter(row.owner, &id).await;
        let used = entered.map_err(|error| match self.find(&id) {
            // To SDKs, a sandbox that does not run looks like one that is gone.
            Ok(row) if row.state == SandboxState::Running => self.0.describe.using(error),
            _ => Error::no_sandbox(&id),
        })?;
        Ok(Target { row: Arc::new(row), settings: Arc::new(settings), used: Arc::new(used) })
    }

    /// Answers a request to the processes and files of a sandbox.
    pub async fn envd(&self, row: SandboxRow, request: Request) -> Response {
        envd::serve(self, row, request).await
    }

    /// Checks the token of a request to another port of a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the sandbox's ports are private and the request has not their token.
    pub fn admit_to_port(&self, row: &SandboxRow, request: &Request) -> Result<(), Error> {
        if Settings::of(row).public_traffic {
            return Ok(());
        }
        let shown = request.headers().get("e2b-traffic-access-token");
        let wanted = token::traffic(row);
        let is_right = shown.is_some_and(|shown| token::equal(shown.as_bytes(), &wanted));
        is_right.then_some(()).ok_or_else(|| {
            Error::forbidden("this sandbox's ports need the header `e2b-traffic-access-token`")
        })
    }

    /// Returns what a link for an upload is for, by its token.
    #[must_use]
    pub fn upload(&self, token: &str) -> Option<Upload> {
        self.0.uploads.link(token).map(|(identity, hash)| Upload(identity, hash))
    }

    /// Receives the files that a link for an upload is for.
    pub async fn receive(&self, upload: &Upload, request: Request) -> Response {
        let archive = ArchiveOf { owner: upload.0.user(), hash: upload.1.clone() };
        let received = api::receive(self, archive, request).await;
        received.unwrap_or_else(IntoResponse::into_response)
    }

    /// Returns the sandbox that a signed URL is for, which names none.
    ///
    /// The caller has shown no key yet, so the tokens are kept in memory, and read again at most
    /// once in a second.
    #[must_use]
    pub fn of_signature(&self, request: &Request) -> Option<String> {
        let query = request.uri().query().filter(|query| query.len() <= QUERY_BYTES_MAX)?;
        let signed = token::Signed::of(query, request.method()).filter(token::Signed::is_formed)?;
        let mut tokens = self.0.tokens.lock();
        loop {
            let found = tokens.all.iter().find(|(_, access)| signed.is_for(access));
            if let Some((id, _)) = found {
                return Some(id.to_string());
            }
            if tokens.read_at.is_some_and(|at| at.elapsed() < TOKENS_AGE) {
                return None;
            }
            let rows = self.0.control.list_all().ok()?;
            tokens.all = rows.iter().map(|row| (row.id, token::access(row))).collect();
            tokens.read_at = Some(Instant::now());
        }
    }
}
