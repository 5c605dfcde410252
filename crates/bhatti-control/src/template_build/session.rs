//! The work of a template's build in its sandbox.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::{AgentClient, ExecEvent};
use bhatti_proto::ExecRequest;
use bhatti_store::{SandboxRow, SnapshotKind};
use bhatti_types::{ImageConfig, Report};
use tokio::io::AsyncReadExt;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

use super::files::StepFiles;
use super::{CACHED_MAX, Step, TemplateBuild};
use crate::Control;
use crate::build_errors::TemplateBuildError;
use crate::create::CreateError;
use crate::operations::Operation;

/// How long a start command may take to be ready, in seconds.
const READY_SECONDS: u64 = 600;

/// The time between two looks whether the start command is ready.
const READY_EVERY: Duration = Duration::from_millis(300);

/// Size of the pieces in which files are sent, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// A build in its sandbox.
pub(super) struct Session<'a> {
    pub(super) control: &'a Control,
    pub(super) sandbox: SandboxRow,
    /// The environment of the template that this one begins with.
    pub(super) base_env: BTreeMap<String, String>,
    /// The settings of processes, as the steps so far have changed them.
    pub(super) config: ImageConfig,
    /// The shell of the commands; that of the image if empty.
    pub(super) shell: Vec<String>,
    pub(super) operation: &'a Operation,
    pub(super) files: Option<Arc<StepFiles>>,
}

impl Session<'_> {
    /// Runs the steps after the first `done` ones, and the start command. Returns the sandbox
    /// to save, with its settings.
    pub(super) async fn run(
        &mut self,
        request: &TemplateBuild,
        keys: &[String],
        done: usize,
    ) -> Result<SandboxRow, TemplateBuildError> {
        let owner = self.sandbox.owner;
        let used = self.control.enter(owner, &self.sandbox.id.to_string()).await?;
        let agent = used.agent.clone();
        let count = request.steps.len();
        for (number, (step, key)) in (1..).zip(request.steps.iter().zip(keys)) {
            let cached = if number <= done { " (cached)" } else { "" };
            self.say(&format!("[{number}/{count}] {}{cached}\n", step.text()));
            if number > done {
                self.step(&agent, number, step).await?;
            }
            step.apply(&self.base_env, &mut self.config)?;
            if number > done && step.changes_files() {
                self.cache(key).await?;
            }
        }
        if let Some(start) = &request.start {
            self.say(&format!("starting: {start}\n"));
            self.start(&agent, start, request.ready.as_deref()).await?;
        }
        self.row()
    }

    /// Returns the sandbox's row, with the settings of the steps so far.
    fn row(&self) -> Result<SandboxRow, TemplateBuildError> {
        let mut row = self.control.find(self.sandbox.owner, &self.sandbox.id.to_string())?;
        row.spec.image_config = self.config.clone();
        Ok(row)
    }

    fn say(&self, text: &str) {
        self.operation.write(text.as_bytes());
    }

    async fn step(
        &self,
        agent: &AgentClient,
        number: usize,
        step: &Step,
    ) -> Result<(), TemplateBuildError> {
        match step {
            Step::Env(_) | Step::ExpandedEnv(_) | Step::User(_) => Ok(()),
            Step::Workdir(path) => {
                Ok(agent.acting_as(Some("0")).make_directory(path, "", true).await?)
            }
            Step::Copy { from, to, user } => self.copy(agent, from, to, user.as_deref()).await,
            Step::Run { command, user } => {
                let code = self.exec(agent, command, user.as_deref()).await?;
                if code == 0 {
                    return Ok(());
                }
                Err(TemplateBuildError::Failed { number, step: step.text(), code })
            }
        }
    }

    /// Returns a command of the shell, with the settings of the steps so far.
    fn command(&self, command: &str) -> ExecRequest {
        let mut argv = self.shell.clone();
        if argv.is_empty() {
            argv.clone_from(&self.config.shell);
        }
        if argv.is_empty() {
            argv = ["/bin/sh", "-c"].map(str::to_owned).to_vec();
        }
        argv.push(command.to_owned());
        let is_set = |text: &String| (!text.is_empty()).then(|| text.clone());
        ExecRequest {
            argv,
            env: self.base_env.clone().into_iter().chain(self.config.env.clone()).collect(),
            user: is_set(&self.config.user),
            cwd: is_set(&self.config.workdir),
            ..ExecRequest::default()
        }
    }

    /// Runs a command, whose output goes to the log. Returns its exit code.
    async fn exec(
        &self,
        agent: &AgentClient,
        command: &str,
        user: Option<&str>,
    ) -> Result<i32, TemplateBuildError> {
        let mut request = self.command(command);
        if let Some(user) = user {
            request.user = Some(user.to_owned());
        }
        let (mut input, mut output) = agent.exec(request).await?;
        input.end().await?;
        loop {
            match output.next().await? {
                ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => self.operation.write(&bytes),
                ExecEvent::TimedOut => {}
                ExecEvent::Exit(code) => return Ok(code),
            }
        }
    }

    async fn copy(
        &self,
        agent: &AgentClient,
        from: &str,
        to: &str,
        user: Option<&str>,
    ) -> Result<(), TemplateBuildError> {
        let files = self.files.clone().ok_or(TemplateBuildError::NoFiles)?;
        let target = self.control.image_upload();
        let target = target.map_err(CreateError::Image)?;
        let (from, to) = (from.to_owned(), to.to_owned());
        let part = spawn_blocking(move || files.part(&from, &to, target));
        let part = part.await.map_err(std::io::Error::other)??;
        let agent = agent.acting_as(Some(user.unwrap_or("0")));
        let mut upload = agent.write_archive(&part.directory).await?;
        let mut archive = tokio::fs::File::from_std(part.archive);
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let length = archive.read(&mut piece).await?;
            if length == 0 || upload.write(&piece[..length]).await.is_err() {
                break;
            }
        }
        // Returns why the guest refused the rest.
        let _is_refused = upload.end().await;
        upload.finish().await?;
        Ok(())
    }

    /// Starts the start command, and waits until it is ready.
    async fn start(
        &self,
        agent: &AgentClient,
        start: &str,
        ready: Option<&str>,
    ) -> Result<(), TemplateBuildError> {
        let request = ExecRequest {
            restart: true,
            stop_signal: self.config.stop_signal_number(),
            ..self.command(start)
        };
        let job = agent.create_detached(request).await?;
        let Some(ready) = ready else { return Ok(()) };
        let (_info, _input, mut output) = agent.observe(&job.session_id, Some(0)).await?;
        let until = Instant::now() + Duration::from_secs(READY_SECONDS);
        let mut is_ready = Box::pin(self.wait_ready(agent, ready));
        loop {
            tokio::select! {
                event = output.next() => match event? {
                    ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => {
                        self.operation.write(&bytes);
                    }
                    ExecEvent::TimedOut => {}
                    ExecEvent::Exit(code) => return Err(TemplateBuildError::Ended(code)),
                },
                ready = &mut is_ready => return ready,
                () = sleep_until(until) => {
                    return Err(TemplateBuildError::NotReady(READY_SECONDS));
                }
            }
        }
    }

    async fn wait_ready(&self, agent: &AgentClient, ready: &str) -> Result<(), TemplateBuildError> {
        loop {
            let (code, ..) = agent.run(self.command(ready)).await?;
            if code == 0 {
                return Ok(());
            }
            sleep(READY_EVERY).await;
        }
    }

    /// Caches the state after a step. A build goes on if there is no room for it.
    async fn cache(&self, key: &str) -> Result<(), TemplateBuildError> {
        let control = self.control;
        let owner = self.sandbox.owner;
        if let Some(old) = control.inner.store.find_step(owner, key)? {
            control.remove_snapshot(&old).await?;
        }
        let (row, kind) = (self.row()?, SnapshotKind::Step(key.to_owned()));
        let saving = control.clone();
        // A canceled build leaves no files without a row.
        let saved = tokio::spawn(async move { saving.save_hidden(row, kind).await });
        match saved.await.map_err(std::io::Error::other)? {
            Ok(_) => {
                control.forget_steps(owner, CACHED_MAX).await?;
                Ok(())
            }
            Err(error) => {
                warn!(error = %Report(&error), "Failed to cache a step of a template");
                Ok(())
            }
        }
    }
}
