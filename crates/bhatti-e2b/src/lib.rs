//! The API of E2B's SDKs, on bhatti's sandboxes.
//!
//! Two parts answer a request. The control plane (`api`) creates and changes sandboxes for the
//! owner of an API key. The sandbox side (`envd`) serves the processes and files of one sandbox to
//! whoever has the sandbox's access token. Other ports of a sandbox are plain HTTP, which the
//! server relays.
//!
//! The server identifies keys, counts rates and requests, and calls this crate. What the SDKs
//! expect was found by running them.

mod api;
mod code;
mod connect;
mod envd;
mod error;
mod place;
mod settings;
mod status;
mod token;

use std::sync::Arc;

use axum::extract::Request;
use axum::response::Response;
use bhatti_control::{Control, CreateError, ForkError, SnapshotOpError};
use bhatti_node::{SandboxUse, UseError};
use bhatti_store::{SandboxRow, StoreError};
use bhatti_types::{SandboxState, UserId};
use tower_service::Service as _;

pub use error::Error;
pub use place::{ENVD_PORT, Place, key};

use settings::Settings;

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
    /// A failed query.
    fn store(&self, error: StoreError) -> Error;
}

/// The API.
#[derive(Clone)]
pub struct E2b(Arc<Inner>);

struct Inner {
    control: Control,
    describe: Box<dyn Describe>,
    /// Host names of sandboxes' ports are below this domain.
    zone: Option<String>,
    watchers: envd::Watchers,
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

impl E2b {
    /// Creates the API of a daemon.
    #[must_use]
    pub fn new(control: Control, describe: Box<dyn Describe>, zone: Option<String>) -> Self {
        let watchers = envd::Watchers::default();
        Self(Arc::new(Inner { control, describe, zone, watchers }))
    }

    /// Answers a request to the control plane by `owner`.
    pub async fn control_plane(&self, owner: UserId, mut request: Request) -> Response {
        request.extensions_mut().insert(api::Owner(owner));
        let mut routes = api::router().with_state(self.clone());
        // A router never fails.
        routes.call(request).await.unwrap_or_else(|never| match never {})
    }

    /// Finds the sandbox of a request, and wakes it.
    ///
    /// # Errors
    ///
    /// Returns the answers that SDKs take for a sandbox that is gone, and the errors of a sandbox
    /// that cannot be woken.
    pub async fn enter(&self, id: &str) -> Result<Target, Error> {
        let row = self.row(id)?;
        let settings = Settings::of(&row);
        if row.state == SandboxState::Stopped && settings.auto_resume {
            api::resume(self, &row, &settings, None).await?;
        }
        let entered = self.0.control.enter(row.owner, id).await;
        let used = entered.map_err(|error| match self.row(id) {
            // To SDKs, a sandbox that does not run looks like one that is gone.
            Ok(row) if row.state == SandboxState::Running => self.0.describe.using(error),
            _ => Error::no_sandbox(id),
        })?;
        Ok(Target { row: Arc::new(row), settings: Arc::new(settings), used: Arc::new(used) })
    }

    /// Finds the owner of a sandbox, to charge a request to it before the sandbox is woken.
    ///
    /// # Errors
    ///
    /// Returns the answer that SDKs take for a sandbox that is gone.
    pub fn owner(&self, id: &str) -> Result<UserId, Error> {
        self.row(id).map(|row| row.owner)
    }

    fn row(&self, id: &str) -> Result<SandboxRow, Error> {
        let gone = || Error::no_sandbox(id);
        let parsed = id.parse().map_err(|_| gone())?;
        let row = self.0.control.find_any(parsed);
        row.map_err(|error| self.0.describe.store(error))?.ok_or_else(gone)
    }

    /// Answers a request to the processes and files of a sandbox.
    pub async fn envd(&self, id: &str, request: Request) -> Response {
        envd::serve(self, id, request).await
    }

    /// Checks the token of a request to another port of a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the sandbox's ports are private and the request has not their token.
    pub fn admit_to_port(&self, target: &Target, request: &Request) -> Result<(), Error> {
        if target.settings.public_traffic {
            return Ok(());
        }
        let shown = request.headers().get("e2b-traffic-access-token");
        let wanted = token::traffic(&target.row);
        let is_right = shown.is_some_and(|shown| token::equal(shown.as_bytes(), &wanted));
        is_right.then_some(()).ok_or_else(|| {
            Error::forbidden("this sandbox's ports need the header `e2b-traffic-access-token`")
        })
    }

    /// Returns the sandbox that a signed URL is for, which names none.
    #[must_use]
    pub fn of_signature(&self, request: &Request) -> Option<String> {
        let query = request.uri().query()?;
        let signed = token::Signed::of(query, request.method())?;
        let rows = self.0.control.list_all().ok()?;
        rows.iter().find(|row| signed.is_for(row)).map(|row| row.id.to_string())
    }
}
