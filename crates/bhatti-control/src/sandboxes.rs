//! Sandboxes by owner and name: finding, using, changing and destroying them.

use bhatti_agent::{ExecInput, ExecOutput};
use bhatti_node::{SandboxUse, Usage, UseError};
use bhatti_proto::{ExecRequest, LoadInfo};
use bhatti_store::{
    ChangeError, SandboxChange, SandboxFilter, SandboxRow, StoreError, StoredSandbox,
};
use bhatti_types::{SandboxId, Thermal, TimeLimitChange, UserId};
use serde_json::json;

use crate::Control;

/// A sandbox could not be edited. It is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// The owner has no such sandbox.
    #[error(transparent)]
    Use(#[from] UseError),
    /// The new name or labels are refused.
    #[error(transparent)]
    Change(#[from] ChangeError),
}

impl Control {
    /// Returns the sandbox of `owner` with this id or name.
    ///
    /// # Errors
    ///
    /// Returns [`UseError::NotFound`] if the owner has no such sandbox.
    pub fn find(&self, owner: UserId, id_or_name: &str) -> Result<SandboxRow, UseError> {
        let row = self.inner.store.find_sandbox(owner, id_or_name)?;
        row.ok_or_else(|| UseError::NotFound(id_or_name.to_owned()))
    }

    /// Returns a sandbox of any owner. For callers that are known by something else than a key.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_any(&self, id: SandboxId) -> Result<Option<SandboxRow>, StoreError> {
        self.inner.store.get_sandbox(id)
    }

    /// Returns the sandboxes of all owners.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_all(&self) -> Result<Vec<SandboxRow>, StoreError> {
        self.inner.store.list_all_sandboxes()
    }

    /// Stores what a second API keeps with a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such sandbox.
    pub fn set_annex(&self, id: SandboxId, annex: &str) -> Result<(), StoreError> {
        self.inner.store.set_sandbox_annex(id, annex)
    }

    /// Returns the id of the sandbox of `owner` with this id or name.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub fn find_id(&self, owner: UserId, id_or_name: &str) -> Result<SandboxId, UseError> {
        let id = self.inner.store.find_sandbox_id(owner, id_or_name)?;
        id.ok_or_else(|| UseError::NotFound(id_or_name.to_owned()))
    }

    /// Returns the sandboxes of `owner` that a filter selects, newest first, without their guests'
    /// reports.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list(
        &self,
        owner: UserId,
        filter: &SandboxFilter,
    ) -> Result<Vec<SandboxRow>, StoreError> {
        self.inner.store.list_sandboxes(owner, filter)
    }

    /// Calls `each` for the sandboxes that a filter selects, newest first, as
    /// [`Store::each_sandbox`](bhatti_store::Store::each_sandbox) does.
    ///
    /// # Errors
    ///
    /// Returns the first error of `each` or of the store.
    pub fn each_sandbox(
        &self,
        owner: UserId,
        filter: &SandboxFilter,
        each: impl FnMut(StoredSandbox<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.inner.store.each_sandbox(owner, filter, each)
    }

    /// Changes a sandbox's name or labels. Its host name stays.
    ///
    /// # Errors
    ///
    /// Returns an error if the new name or labels are refused.
    pub fn edit(
        &self,
        owner: UserId,
        id_or_name: &str,
        change: SandboxChange,
    ) -> Result<SandboxRow, EditError> {
        let row = self.find(owner, id_or_name)?;
        self.inner.store.change_sandbox(row.id, change)?;
        self.inner.node.rename_in_networks();
        let row = self.find(owner, &row.id.to_string())?;
        let sandbox = Some((row.id, row.spec.name.to_string()));
        self.record("sandbox.changed", owner, sandbox, json!({}));
        Ok(row)
    }

    /// Takes a lease of a sandbox: wakes it if it sleeps, and keeps it hot until the lease is
    /// dropped.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has no such sandbox or the sandbox cannot be used.
    pub async fn enter(&self, owner: UserId, id_or_name: &str) -> Result<SandboxUse, UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.inner.node.enter(id).await
    }

    /// Starts a command in a sandbox and waits until it runs. `whole_input`, if it is short and
    /// complete, travels with the request, and the command's input ends with it.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has no such sandbox, the sandbox cannot be used, its agent
    /// does not answer, or the command cannot be started.
    pub async fn exec(
        &self,
        owner: UserId,
        id_or_name: &str,
        request: ExecRequest,
        whole_input: Option<&[u8]>,
    ) -> Result<(ExecInput, ExecOutput), UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.inner.node.exec(id, request, whole_input).await
    }

    /// Pauses a sandbox until the next use. Does nothing if it sleeps.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be paused. Its state is then unchanged.
    pub async fn pause(&self, owner: UserId, id_or_name: &str) -> Result<SandboxRow, UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.inner.node.pause(id).await?;
        self.find(owner, &id.to_string())
    }

    /// Makes a sandbox hot, unless it is stopped.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be woken. Its state is then unchanged.
    pub async fn resume(&self, owner: UserId, id_or_name: &str) -> Result<SandboxRow, UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.inner.node.wake(id).await?;
        self.find(owner, &id.to_string())
    }

    /// Saves a sandbox and ends its VM until it is started.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be stopped. It then runs as before.
    pub async fn stop(&self, owner: UserId, id_or_name: &str) -> Result<SandboxRow, UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.inner.node.stop(id).await?;
        self.find(owner, &id.to_string())
    }

    /// Starts a stopped sandbox. With `cold_boot` it boots from its disk and loses its memory.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be started. Its state is then unchanged.
    pub async fn start(
        &self,
        owner: UserId,
        id_or_name: &str,
        cold_boot: bool,
    ) -> Result<SandboxRow, UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.inner.node.start(id, cold_boot).await?;
        self.find(owner, &id.to_string())
    }

    /// Sets whether a sandbox stays hot while it is unused.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be made hot.
    pub async fn set_keep_hot(
        &self,
        owner: UserId,
        id_or_name: &str,
        keep_hot: bool,
    ) -> Result<SandboxRow, UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.inner.node.set_keep_hot(id, keep_hot).await?;
        self.find(owner, &id.to_string())
    }

    /// Changes when a sandbox ends, and what happens then.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has no such sandbox, or if it is being created or destroyed.
    pub async fn change_time_limit(
        &self,
        owner: UserId,
        id_or_name: &str,
        change: TimeLimitChange,
    ) -> Result<SandboxRow, UseError> {
        let row = self.find(owner, id_or_name)?;
        self.inner.node.change_time_limit(row.id, change).await?;
        self.record("sandbox.changed", owner, Some((row.id, row.spec.name.into())), json!({}));
        self.find(owner, &row.id.to_string())
    }

    /// Returns the activity of a running sandbox.
    #[must_use]
    pub fn thermal(&self, id: SandboxId) -> Option<Thermal> {
        self.inner.node.thermal(id)
    }

    /// Returns the host resources used by the sandboxes of `owner` that have a VM. Does not wake
    /// sandboxes, and does not count as use.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub async fn usage(&self, owner: UserId) -> Result<Vec<(SandboxId, Usage)>, StoreError> {
        let mut ids = Vec::new();
        self.inner.store.each_sandbox(
            owner,
            &SandboxFilter::default(),
            |row: StoredSandbox<'_>| {
                ids.push(row.id()?);
                Ok(())
            },
        )?;
        Ok(self.inner.node.usage(ids).await)
    }

    /// Returns the load in a sandbox that is hot. Does not wake a sandbox, and does not count as
    /// use. Returns `None` if it is not hot or its agent does not answer in time.
    pub async fn load(&self, id: SandboxId) -> Option<LoadInfo> {
        self.inner.node.load(id).await
    }

    /// Destroys a sandbox in any state, and waits until nothing of it is left.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has no such sandbox or some of its files stay.
    ///
    /// # Cancel safety
    ///
    /// A destruction that has begun continues.
    pub async fn destroy(&self, owner: UserId, id_or_name: &str) -> Result<(), UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.inner.node.destroy(id, owner).await
    }
}
