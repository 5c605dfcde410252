//! The operations on a VM that exists.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, Captured, SnapshotError, SnapshotRequest, Vm, VmmError};
use bhatti_host::process::Usage;

use crate::api::State;
use crate::capture;
use crate::vm::FirecrackerVm;

#[async_trait]
impl Vm for FirecrackerVm {
    fn channel(&self) -> Arc<dyn AgentChannel> {
        Arc::clone(&self.channel) as Arc<dyn AgentChannel>
    }

    async fn is_running(&self) -> Result<bool, VmmError> {
        Ok(self.api.instance().await?.state == State::Running)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.change_state(State::Running, "Paused").await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.change_state(State::Paused, "Resumed").await
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
