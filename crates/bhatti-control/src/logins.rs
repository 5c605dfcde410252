//! Logins at registries: sealed in the store, and used for pulls and pushes of their owner.

use bhatti_node::{Credentials, PullError, Reference};
use bhatti_secret::{SealError, UnsealError};
use bhatti_store::{CountError, LOGIN_PREFIX, StoreError};
use bhatti_types::{QuotaExceeded, Report, UserId};
use serde_json::json;
use tracing::warn;

use crate::Control;
use crate::secrets::seal_context;

/// Maximum length of a user's name at a registry, in characters.
const USER_MAX: usize = 256;
/// Maximum length of a password or token, in characters. Tokens of cloud registries have up to
/// 3,000.
const PASSWORD_MAX: usize = 8192;

/// A login at a registry, without its password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// The registry, such as `docker.io` or `registry.example.com:5000`.
    pub registry: String,
    /// The user's name there; empty if it cannot be read.
    pub user: String,
    /// When it was first stored (RFC 3339).
    pub created_at: String,
    /// When it was last stored (RFC 3339).
    pub updated_at: String,
}

/// An operation on a login failed. The stored logins are unchanged.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// It is not the name of a registry.
    #[error("`{0}` is not a registry: expected HOST or HOST:PORT, such as docker.io")]
    Registry(String),
    /// The name or the password is empty or too long.
    #[error(
        "a login needs a user name of 1 to {USER_MAX} characters and a password of 1 to {PASSWORD_MAX}"
    )]
    Length,
    /// The user has no login there.
    #[error("there is no login at `{0}`")]
    NotFound(String),
    /// The registry refuses the login, or cannot be asked.
    #[error("failed to log in at `{registry}`")]
    Refused {
        /// The registry.
        registry: String,
        /// Why.
        #[source]
        error: PullError,
    },
    /// The login could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The login cannot be unsealed.
    #[error("the login at `{registry}` cannot be read")]
    Unseal {
        /// The registry.
        registry: String,
        /// The cause.
        #[source]
        source: UnsealError,
    },
    /// The owner has too many secrets and logins.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<CountError> for LoginError {
    fn from(error: CountError) -> Self {
        match error {
            CountError::TooMany(quota) => Self::Quota(quota),
            CountError::Store(error) => Self::Store(error),
        }
    }
}

impl Control {
    /// Stores a login at a registry, after the registry has accepted it. It replaces an earlier
    /// one.
    ///
    /// # Errors
    ///
    /// Returns an error if the registry refuses it or cannot be asked.
    pub async fn log_in(
        &self,
        owner: UserId,
        registry: &str,
        credentials: Credentials,
    ) -> Result<Login, LoginError> {
        let Some(registry) = registry_named(registry) else {
            return Err(LoginError::Registry(registry.chars().take(200).collect()));
        };
        let registry = registry.as_str();
        let Credentials { user, password } = &credentials;
        let fits = |text: &str, max| (1..=max).contains(&text.chars().count());
        if !fits(user, USER_MAX) || !fits(password, PASSWORD_MAX) {
            return Err(LoginError::Length);
        }
        let checked = self.inner.node.check_login(registry, &credentials).await;
        checked.map_err(|error| LoginError::Refused { registry: registry.to_owned(), error })?;
        let text = json!([user, password]).to_string();
        let sealed = self.inner.secrets.seal(&context(owner, registry), text.as_bytes())?;
        let row = self.inner.store.set_login(owner, registry, &sealed)?;
        self.record("registry.login", owner, None, json!({ "registry": registry }));
        Ok(Login {
            registry: registry.to_owned(),
            user: user.clone(),
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }

    /// Returns the logins of `owner`, by registry.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_logins(&self, owner: UserId) -> Result<Vec<Login>, LoginError> {
        let login = |row: bhatti_store::SecretRow| {
            let user = match self.read_login(owner, &row.name) {
                Ok(credentials) => credentials.map(|it| it.user).unwrap_or_default(),
                Err(error) => {
                    warn!(error = %Report(&error), "Failed to read a login at a registry");
                    String::new()
                }
            };
            let (created_at, updated_at) = (row.created_at, row.updated_at);
            Login { registry: row.name, user, created_at, updated_at }
        };
        Ok(self.inner.store.list_logins(owner)?.into_iter().map(login).collect())
    }

    /// Deletes a login.
    ///
    /// # Errors
    ///
    /// Returns [`LoginError::NotFound`] if the owner has no login at that registry.
    pub fn log_out(&self, owner: UserId, registry: &str) -> Result<(), LoginError> {
        let registry = registry_named(registry).unwrap_or_else(|| registry.to_owned());
        let name = format!("{LOGIN_PREFIX}{registry}");
        self.inner.store.delete_secret(owner, &name).map_err(|error| match error {
            StoreError::NoSuchRow => LoginError::NotFound(registry.clone()),
            error => error.into(),
        })?;
        self.record("registry.logout", owner, None, json!({ "registry": registry }));
        Ok(())
    }

    /// Returns the owner's login for a pull or a push. One that cannot be read is logged and left
    /// out.
    pub(crate) fn login_of(&self, owner: UserId, registry: &str) -> Option<Credentials> {
        self.read_login(owner, registry).unwrap_or_else(|error| {
            warn!(error = %Report(&error), "Failed to use a login at a registry");
            None
        })
    }

    fn read_login(&self, owner: UserId, registry: &str) -> Result<Option<Credentials>, LoginError> {
        let name = format!("{LOGIN_PREFIX}{registry}");
        let Some(sealed) = self.inner.store.get_secret(owner, &name)? else { return Ok(None) };
        let failed = |source| LoginError::Unseal { registry: registry.to_owned(), source };
        let plain = self.inner.secrets.unseal(&context(owner, registry), &sealed);
        let plain = plain.map_err(failed)?;
        // Only such a text is ever sealed.
        let pair: Option<(String, String)> = serde_json::from_slice(&plain).ok();
        Ok(pair.map(|(user, password)| Credentials { user, password }))
    }
}

/// Returns the name that references have for a registry: `docker.io` for `index.docker.io`.
/// Returns nothing if no reference can have that registry: only a name with a point or a port, or
/// `localhost`, is that of a registry.
fn registry_named(name: &str) -> Option<String> {
    let reference = format!("{name}/a/b").parse::<Reference>().ok()?;
    (reference.repository() == "a/b").then(|| reference.registry().to_owned())
}

fn context(owner: UserId, registry: &str) -> String {
    seal_context(&owner.to_string(), &format!("{LOGIN_PREFIX}{registry}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_have_the_name_that_references_have_for_them() {
        for (name, known) in [
            ("docker.io", Some("docker.io")),
            ("index.docker.io", Some("docker.io")),
            ("localhost", Some("localhost")),
            ("host:5000", Some("host:5000")),
            ("r.example.com:5000", Some("r.example.com:5000")),
            ("library", None),
            ("0", None),
            ("", None),
            ("name/below", None),
            ("r.example.com/below", None),
            ("host:1:2", None),
            ("https://docker.io", None),
        ] {
            assert_eq!(registry_named(name).as_deref(), known, "{name}");
        }
    }
}
