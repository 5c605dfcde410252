//! Runs file operations on threads of a pool, each as its user, with a limit on how many run at
//! once.
//!
//! A file system in the guest may never answer (a dead FUSE or NFS mount). It then blocks a
//! thread of the pool, and never the agent's main thread, which serves everything else.

use std::sync::Arc;
use std::time::Duration;

use bhatti_proto::{AgentError, ErrorKind};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::Agent;
use crate::refusal::{OpError, io_refused, refused};
use crate::user::{self, User};

/// Limits the number of file operations that run at once.
#[derive(Debug)]
pub(crate) struct Workers {
    free: Arc<Semaphore>,
    limit: usize,
    wait: Duration,
}

impl Workers {
    /// Allows `limit` operations at once. A further operation waits for at most `wait`.
    pub(crate) fn new(limit: usize, wait: Duration) -> Self {
        Self { free: Arc::new(Semaphore::new(limit)), limit, wait }
    }
}

/// A file operation on its thread. If this handle is dropped, the operation continues until it
/// notices that its receiver is gone.
pub(crate) struct Work<T>(JoinHandle<Result<T, AgentError>>);

impl<T> Work<T> {
    /// Waits for the operation's end.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub(crate) async fn end(&mut self) -> Result<T, OpError> {
        let interrupted = |_| refused(ErrorKind::Other, "the file operation was interrupted");
        Ok((&mut self.0).await.map_err(interrupted)??)
    }
}

/// Begins a file operation as the user that the request names, or else as the usual user.
///
/// # Errors
///
/// Refused if there is no such user, or if too many file operations run and none ends in time.
pub(crate) async fn begin<T: Send + 'static>(
    agent: &Agent,
    user: Option<&str>,
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<Work<T>, OpError> {
    let user = user::acting(agent, user)?;
    begin_as(agent, user, work).await
}

/// Begins a file operation as the agent's own user, which is root in a guest.
pub(crate) async fn begin_as_agent<T: Send + 'static>(
    agent: &Agent,
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<Work<T>, OpError> {
    begin_as(agent, None, work).await
}

async fn begin_as<T: Send + 'static>(
    agent: &Agent,
    user: Option<User>,
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<Work<T>, OpError> {
    let Workers { free, limit, wait } = &agent.file_workers;
    let permit = timeout(*wait, Arc::clone(free).acquire_owned()).await;
    let Ok(Ok(permit)) = permit else {
        let message = format!(
            "{limit} file operations are under way and none has ended within {} s",
            wait.as_secs()
        );
        return Err(refused(ErrorKind::Limit, message).into());
    };
    Ok(Work(tokio::task::spawn_blocking(move || {
        let _permit = permit;
        match user {
            None => work(),
            Some(user) => {
                let cannot = |error| io_refused("act as", user.name.as_ref(), &error);
                user.act(work).map_err(cannot)?
            }
        }
    })))
}
