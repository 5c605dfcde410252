//! What builds of images and templates have in common: files that are sent, and a log.

use std::io;
use std::path::Path;

use bhatti_api::Operation;
use bhatti_client::{ClientError, Upload};
use tokio::io::AsyncWriteExt;
use tokio_util::io::SyncIoBridge;

use super::Context;
use super::file::pack;
use super::image_pull::outcome;
use crate::error::CliError;
use crate::output::Transfer;

/// Size of the buffer between the packing of files and their upload, in bytes.
const PIPE_BYTES: usize = 256 << 10;

/// How long one call waits for the end of a build, in seconds.
const WAIT_SECONDS: u32 = 30;

/// Sends the wanted files of a directory with the request that begins a build.
pub(super) async fn send_directory(
    context: &Context,
    directory: &Path,
    wanted: impl Fn(&Path, bool) -> bool + Send + 'static,
    begin: impl AsyncFnOnce(Upload) -> Result<Operation, ClientError>,
) -> Result<Operation, CliError> {
    let (writer, reader) = tokio::io::duplex(PIPE_BYTES);
    let packed = directory.to_owned();
    let packing =
        tokio::task::spawn_blocking(move || pack(&packed, SyncIoBridge::new(writer), wanted));
    let transfer = Transfer::begin(context.output, "sending the files", None);
    let begun = begin(Upload::new(transfer.counting(reader), None)).await;
    drop(transfer);
    match packing.await.map_err(io::Error::other)? {
        // The daemon refused the rest, and says why.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(CliError::new(format!("failed to read `{}`: {error}", directory.display())))
        }
        _ => Ok(begun?),
    }
}

/// Shows the log of a build until it has ended. Ctrl+C cancels the build.
pub(super) async fn follow_log(
    context: &Context,
    mut operation: Operation,
) -> Result<Operation, CliError> {
    let client = &context.client;
    let is_canceled = tokio::select! {
        shown = show_log(context, &operation.id) => shown.map(|()| false)?,
        _ = tokio::signal::ctrl_c() => true,
    };
    if is_canceled {
        operation = client.cancel_operation(&operation.id).await?;
    }
    while operation.status == "running" {
        operation = client.operation(&operation.id, WAIT_SECONDS).await?;
    }
    outcome(operation, "the next one uses the results of the steps that ended")
}

async fn show_log(context: &Context, id: &str) -> Result<(), CliError> {
    let mut log = context.client.operation_log(id, 0).await?;
    let mut stderr = tokio::io::stderr();
    while let Some(piece) = log.next().await? {
        if !context.output.quiet {
            stderr.write_all(&piece).await?;
            stderr.flush().await?;
        }
    }
    Ok(())
}
