//! A VM: the VMM's process and the connections to it.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, Captured, SnapshotError, SnapshotRequest, Vm, VmmError};
use bhatti_host::blocking;
use bhatti_host::process::{Followed, Usage};
use bhatti_types::SandboxId;

use crate::record::Record;
use crate::save;
use crate::vmm::{Connections, Launch, Running, VmState, Vmm, report_log};

/// Starts a VMM, records its process, and attaches to it.
pub(crate) fn start<V: Vmm>(vmm: &Arc<V>, launch: &Launch<'_>) -> io::Result<Running<V>> {
    let process = vmm.start(launch)?;
    // Change the errors' kind: `NotFound` means that the VMM's program is missing.
    let failed = |error: io::Error| io::Error::other(error);
    let Launch { id, directory, machine, .. } = *launch;
    let record = Record::new(directory, process.id(), machine.clone());
    record.change(|_| {}).map_err(failed)?;
    Running::attach(Arc::clone(vmm), id, process, record).map_err(failed)
}

impl<V: Vmm> Running<V> {
    /// Attaches to the VM of `process`. Does not contact the agent: a paused or busy guest is
    /// alive, too. Blocks for a moment.
    pub(crate) fn attach(
        vmm: Arc<V>,
        id: SandboxId,
        process: Followed,
        record: Record,
    ) -> io::Result<Self> {
        let Connections { control, channel, console } = vmm.connect(record.directory())?;
        Ok(Self { vmm, id, process, record: Arc::new(record), control, channel, console })
    }

    /// Returns the end of the guest's console, once the VMM has ended.
    pub(crate) async fn last_words(&self) -> String {
        blocking(|| report_log::<V>(self.directory()));
        self.last_console().await
    }
}

#[async_trait]
impl<V: Vmm> Vm for Running<V> {
    fn channel(&self) -> Arc<dyn AgentChannel> {
        Arc::clone(&self.channel) as Arc<dyn AgentChannel>
    }

    async fn is_running(&self) -> Result<bool, VmmError> {
        Ok(self.vmm.state(self).await? == VmState::Running)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.vmm.pause(self).await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.vmm.resume(self).await
    }

    async fn merge_disk(&self, to_save_space: bool) -> Result<bool, VmmError> {
        self.vmm.merge_disk(self, to_save_space).await
    }

    async fn capture(&self, request: &SnapshotRequest) -> Result<Box<dyn Captured>, SnapshotError> {
        save::capture(self, request).await
    }

    async fn ended(&self) {
        self.process.ended().await;
    }

    fn usage(&self) -> io::Result<Usage> {
        self.process.usage()
    }

    fn console_tail(&self) -> String {
        self.console.tail()
    }

    async fn last_console(&self) -> String {
        self.console.complete().await;
        self.console.tail()
    }
}
