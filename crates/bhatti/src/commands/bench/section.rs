//! The sections of a benchmark.

use std::time::Duration;

use bhatti_api::{CreateSandbox, CreateSnapshot, ExecRequest, ForkSandbox, StartSandbox};
use bhatti_client::{Client, ClientError, Upload};
use tokio::time::{Instant, sleep};

/// Size of the file that is written and read, in bytes.
const FILE_BYTES: usize = 1 << 20;

/// Lifetime of the benchmark's sandboxes, in seconds, which limits those of an interrupted run.
const LIFETIME_SEC: u32 = 3600;

/// Pause before a creation, so that the daemon's spares are ready.
const REST: Duration = Duration::from_secs(2);

/// An operation that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Create,
    Burst,
    Exec,
    File,
    Pause,
    Wake,
    Start,
    Fork,
    Snapshot,
}

impl Section {
    pub(super) const NAMES: [&'static str; 9] =
        ["create", "burst", "exec", "file", "pause", "wake", "start", "fork", "snapshot"];
    pub(super) const ALL: [Self; 9] = [
        Self::Create,
        Self::Burst,
        Self::Exec,
        Self::File,
        Self::Pause,
        Self::Wake,
        Self::Start,
        Self::Fork,
        Self::Snapshot,
    ];

    /// Performs the operation once. Returns how long it took, without its preparation and cleanup.
    pub(super) async fn once(
        self,
        client: &Client,
        sandbox: &str,
    ) -> Result<Duration, ClientError> {
        let began = Instant::now();
        match self {
            Self::Create => {
                sleep(REST).await;
                return create(client).await;
            }
            Self::Burst => return create(client).await,
            Self::Exec => exec(client, sandbox).await?,
            Self::File => file(client, sandbox).await?,
            Self::Pause => {
                client.pause(sandbox).await?;
                client.resume(sandbox).await?;
            }
            Self::Wake => {
                client.pause(sandbox).await?;
                let began = Instant::now();
                return exec(client, sandbox).await.map(|()| began.elapsed());
            }
            Self::Start => {
                client.stop(sandbox).await?;
                let began = Instant::now();
                client.start(sandbox, &StartSandbox::default()).await?;
                return exec(client, sandbox).await.map(|()| began.elapsed());
            }
            Self::Fork => return fork(client, sandbox).await,
            Self::Snapshot => return snapshot(client, sandbox).await,
        }
        Ok(began.elapsed())
    }
}

/// Returns the request for a sandbox that expires by itself, in case the benchmark cannot destroy
/// it.
pub(super) fn own_sandbox() -> CreateSandbox {
    CreateSandbox { timeout_sec: Some(LIFETIME_SEC), ..CreateSandbox::default() }
}

async fn create(client: &Client) -> Result<Duration, ClientError> {
    let began = Instant::now();
    let made = client.create(&own_sandbox()).await?.id;
    let ran = exec(client, &made).await.map(|()| began.elapsed());
    client.destroy(&made).await?;
    ran
}

async fn exec(client: &Client, sandbox: &str) -> Result<(), ClientError> {
    let cmd = vec!["true".to_owned()];
    client.exec(sandbox, &ExecRequest { cmd, ..ExecRequest::default() }).await.map(drop)
}

async fn file(client: &Client, sandbox: &str) -> Result<(), ClientError> {
    let content = Upload::new(std::io::Cursor::new(vec![7; FILE_BYTES]), Some(FILE_BYTES as u64));
    client.write_file(sandbox, "/workspace/bench", None, content).await?;
    let mut read = client.read_file(sandbox, "/workspace/bench").await?;
    while read.next().await?.is_some() {}
    Ok(())
}

async fn fork(client: &Client, sandbox: &str) -> Result<Duration, ClientError> {
    let began = Instant::now();
    let forks = client.fork(sandbox, &ForkSandbox::default()).await?;
    let elapsed = began.elapsed();
    for fork in forks.sandboxes {
        client.destroy(&fork.id).await?;
    }
    Ok(elapsed)
}

async fn snapshot(client: &Client, sandbox: &str) -> Result<Duration, ClientError> {
    let name = format!("bench-{sandbox}");
    let began = Instant::now();
    client.create_snapshot(sandbox, &CreateSnapshot { name: name.clone() }).await?;
    let elapsed = began.elapsed();
    client.delete_snapshot(&name).await?;
    Ok(elapsed)
}
