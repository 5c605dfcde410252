//! What users keep beside sandboxes: templates, published ports, and the responses
//! to requests with an idempotency key.

use bhatti_store::{
    PublicationRow, PublishError, Repeated, SandboxRow, StoreError, StoredResponse,
    TemplateInsertError, TemplateRow,
};
use bhatti_types::{Alias, SandboxId, UserId};
use serde_json::json;

use crate::Control;

impl Control {
    /// Returns the templates that `user` can use, newest first: the own ones, and public ones
    /// whose names no own one has.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_templates(&self, user: UserId) -> Result<Vec<TemplateRow>, StoreError> {
        self.inner.store.list_templates(user)
    }

    /// Returns the template with this id or name that `user` can use: an own one, or else a public
    /// one.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_template(
        &self,
        user: UserId,
        id_or_name: &str,
    ) -> Result<Option<TemplateRow>, StoreError> {
        self.inner.store.find_template(user, id_or_name)
    }

    /// Creates a template.
    ///
    /// # Errors
    ///
    /// Returns an error if the name is taken, the owner has too many templates, or the store
    /// fails.
    pub fn create_template(&self, row: TemplateRow) -> Result<TemplateRow, TemplateInsertError> {
        self.inner.store.insert_template(row)
    }

    /// Deletes a template.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if it was deleted already.
    pub async fn delete_template(&self, row: &TemplateRow) -> Result<(), StoreError> {
        self.inner.store.delete_template(row.id)?;
        self.forget_template(row).await;
        Ok(())
    }

    /// Returns the published ports of a sandbox, by port.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_publications(&self, sandbox: SandboxId) -> Result<Vec<PublicationRow>, StoreError> {
        self.inner.store.list_publications(sandbox)
    }

    /// Returns the port that is published under an alias.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_publication(&self, alias: &str) -> Result<Option<PublicationRow>, StoreError> {
        self.inner.store.find_publication(alias)
    }

    /// Publishes a port under the alias `wanted`, or else under `fallback`. A port that is
    /// published already keeps its alias if none is wanted.
    ///
    /// # Errors
    ///
    /// Returns an error if the alias is taken, the sandbox has too many published ports, or the
    /// store fails.
    pub fn publish(
        &self,
        sandbox: &SandboxRow,
        port: u16,
        wanted: Option<Alias>,
        fallback: Alias,
    ) -> Result<PublicationRow, PublishError> {
        let published = self.inner.store.publish(sandbox.id, port, wanted, fallback)?;
        let detail = json!({ "port": port, "alias": published.alias.as_str() });
        self.record_of_port("port.published", sandbox, detail);
        Ok(published)
    }

    /// Unpublishes a port.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if the port is not published.
    pub fn unpublish(&self, sandbox: &SandboxRow, port: u16) -> Result<(), StoreError> {
        self.inner.store.unpublish(sandbox.id, port)?;
        self.record_of_port("port.unpublished", sandbox, json!({ "port": port }));
        Ok(())
    }

    fn record_of_port(&self, kind: &'static str, sandbox: &SandboxRow, detail: serde_json::Value) {
        let name = sandbox.spec.name.to_string();
        self.record(kind, sandbox.owner, Some((sandbox.id, name)), detail);
    }

    /// Reserves an idempotency key, or returns what is known of its first request. `now` is in
    /// seconds since 1970.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn reserve_idempotency_key(
        &self,
        owner: UserId,
        key: &str,
        now: u64,
    ) -> Result<Repeated, StoreError> {
        self.inner.store.reserve_key(owner, key, now)
    }

    /// Stores the response to the request with an idempotency key, or releases the key.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn settle_idempotency_key(
        &self,
        owner: UserId,
        key: &str,
        response: Option<&StoredResponse>,
    ) -> Result<(), StoreError> {
        self.inner.store.settle_key(owner, key, response)
    }
}
