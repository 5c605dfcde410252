//! Commands, jobs and sessions.

use bhatti_api::{Deleted, ExecRequest, ExecResult, Job, Session, StreamRequest};
use http::Method;

use crate::path::{sandbox_path, segment_path};
use crate::stream::{CommandInput, CommandOutput};
use crate::{Client, ClientError, Download, stream};

impl Client {
    /// Runs a command and waits for its whole output.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn exec(
        &self,
        sandbox: &str,
        request: &ExecRequest,
    ) -> Result<ExecResult, ClientError> {
        self.post(&sandbox_path(sandbox, "/exec"), Some(request)).await
    }

    /// Starts a command as a job, which runs without a client. `detach` must be set.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn start_job(
        &self,
        sandbox: &str,
        request: &ExecRequest,
    ) -> Result<Job, ClientError> {
        self.post(&sandbox_path(sandbox, "/exec"), Some(request)).await
    }

    /// One job.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn inspect_job(&self, sandbox: &str, job: &str) -> Result<Job, ClientError> {
        self.get(&segment_path(&sandbox_path(sandbox, "/jobs/"), job, "")).await
    }

    /// Asks a job to end by its stop signal. The daemon kills what is left of it after
    /// `grace_sec` seconds; 10 if absent.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn stop_job(
        &self,
        sandbox: &str,
        job: &str,
        grace_sec: Option<u32>,
    ) -> Result<Job, ClientError> {
        let query = grace_sec.map(|seconds| format!("?grace_sec={seconds}")).unwrap_or_default();
        let path = segment_path(&sandbox_path(sandbox, "/jobs/"), job, &format!("/stop{query}"));
        self.post(&path, None::<&()>).await
    }

    /// A job's output from byte `offset`, or from the first byte that is kept; with `follow`,
    /// until the job ends.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn job_output(
        &self,
        sandbox: &str,
        job: &str,
        offset: Option<u64>,
        follow: bool,
    ) -> Result<Download, ClientError> {
        let offset = offset.map(|offset| format!("&offset={offset}")).unwrap_or_default();
        let rest = format!("/output?follow={follow}{offset}");
        let path = segment_path(&sandbox_path(sandbox, "/jobs/"), job, &rest);
        self.download(Method::GET, &path, &[]).await
    }

    /// Terminal sessions and jobs, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_sessions(&self, sandbox: &str) -> Result<Vec<Session>, ClientError> {
        self.get(&sandbox_path(sandbox, "/sessions")).await
    }

    /// Kills a session's process.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn kill_session(&self, sandbox: &str, session: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path(&sandbox_path(sandbox, "/sessions/"), session, "")).await
    }

    /// Starts a command in a sandbox, with its streams on one connection.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails. The first event of the output, or its error, tells
    /// whether the command started.
    pub async fn start_command(
        &self,
        sandbox: &str,
        start: &StreamRequest,
    ) -> Result<(CommandInput, CommandOutput), ClientError> {
        let path = sandbox_path(sandbox, "/exec/ws");
        stream::start(self, &path, start).await
    }
}
