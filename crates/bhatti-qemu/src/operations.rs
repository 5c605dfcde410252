//! The operations on a VM that exists.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, Captured, SnapshotError, SnapshotRequest, Vm, VmmError};
use bhatti_host::process::Usage;
use serde_json::json;

use crate::vm::QemuVm;
use crate::{capture, merge};

/// How long QEMU may take to stop the vCPUs: it waits for pending disk writes.
const PAUSE_LIMIT: Duration = Duration::from_secs(60);

#[async_trait]
impl Vm for QemuVm {
    fn channel(&self) -> Arc<dyn AgentChannel> {
        Arc::clone(&self.channel) as Arc<dyn AgentChannel>
    }

    async fn is_running(&self) -> Result<bool, VmmError> {
        let status = self.ask("query-status", json!({})).await?;
        status["running"].as_bool().ok_or(VmmError::Garbled)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.qmp.execute(&self.directory, "stop", json!({}), PAUSE_LIMIT).await.map(drop)
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.ask("cont", json!({})).await.map(drop)
    }

    async fn merge_disk(&self, to_save_space: bool) -> Result<bool, VmmError> {
        merge::merge_disk(self, to_save_space).await
    }

    async fn capture(&self, request: &SnapshotRequest) -> Result<Box<dyn Captured>, SnapshotError> {
        capture::capture(self, request).await
    }

    async fn ended(&self) {
        self.process.ended().await;
    }

    fn usage(&self) -> io::Result<Usage> {
        self.process.usage()
    }

    async fn last_console(&self) -> String {
        self.console.complete().await;
        self.console.tail()
    }

    fn console_tail(&self) -> String {
        self.console.tail()
    }
}
