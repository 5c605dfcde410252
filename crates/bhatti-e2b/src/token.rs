//! Tokens of sandboxes, and signed URLs.
//!
//! Tokens are derived from the token that the sandbox's agent expects, which is random, is in no
//! answer, and stays the same as long as the sandbox exists.

use axum::http::Method;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bhatti_store::SandboxRow;
use ring::digest::{Context, SHA256, digest};
use serde::Deserialize;
use subtle::ConstantTimeEq;

/// Returns the token for the processes and files of a sandbox.
pub(crate) fn access(row: &SandboxRow) -> String {
    derive("access", row)
}

/// Returns the token for the ports of a sandbox that are not public.
pub(crate) fn traffic(row: &SandboxRow) -> String {
    derive("traffic", row)
}

fn derive(purpose: &str, row: &SandboxRow) -> String {
    let mut hash = Context::new(&SHA256);
    for part in ["bhatti e2b", purpose, &row.id.to_string(), &row.agent_token] {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hex::encode(hash.finish())
}

/// Whether a text is a secret. Takes the same time wherever they differ.
pub(crate) fn equal(shown: &[u8], secret: &str) -> bool {
    shown.ct_eq(secret.as_bytes()).into()
}

/// The query of a request for a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Signed {
    pub(crate) path: String,
    pub(crate) username: Option<String>,
    pub(crate) signature: Option<String>,
    pub(crate) signature_expiration: Option<String>,
    #[serde(skip)]
    operation: &'static str,
}

impl Signed {
    /// Reads the query of a request for a file. A GET reads, every other method writes.
    pub(crate) fn of(query: &str, method: &Method) -> Option<Self> {
        let mut signed: Self = serde_html_form::from_str(query).ok()?;
        signed.operation =
            if matches!(*method, Method::GET | Method::HEAD) { "read" } else { "write" };
        Some(signed)
    }

    /// Whether the signature has the form of one. Others need no search.
    pub(crate) fn is_formed(&self) -> bool {
        self.signature.as_ref().is_some_and(|text| text.starts_with("v1_") && text.len() == 46)
    }

    /// Whether the signature is that of a sandbox with this access token, be it expired or not.
    pub(crate) fn is_for(&self, access: &str) -> bool {
        let user = self.username.as_deref().unwrap_or_default();
        let mut text = format!("{}:{}:{user}:{access}", self.path, self.operation);
        if let Some(expiration) = &self.signature_expiration {
            text.push(':');
            text.push_str(expiration);
        }
        let wanted =
            format!("v1_{}", STANDARD_NO_PAD.encode(digest(&SHA256, text.as_bytes()).as_ref()));
        self.signature.as_deref().is_some_and(|shown| equal(shown.as_bytes(), &wanted))
    }

    /// Checks the signature of a request to a sandbox.
    pub(crate) fn check(&self, row: &SandboxRow, now: u64) -> Result<(), &'static str> {
        if self.signature.is_none() {
            return Err("missing signature query parameter");
        }
        if !self.is_for(&access(row)) {
            return Err("invalid signature");
        }
        match self.signature_expiration.as_deref().map(str::parse::<u64>) {
            Some(Ok(at)) if at < now => Err("signature is already expired"),
            Some(Err(_)) => Err("invalid signature"),
            _ => Ok(()),
        }
    }
}
