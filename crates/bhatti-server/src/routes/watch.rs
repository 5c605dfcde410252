//! `/sandboxes/{sandbox}/files/watch`: streams the changes of a file or directory.

use std::io;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bhatti_agent::{CallError, FileEvents};
use bhatti_api::{FileChange, FileChangeKind};
use bhatti_node::SandboxUse;
use bhatti_proto::{FileEvent, FileEventKind};
use bytes::Bytes;
use futures_util::stream;
use tokio::time::timeout;

use super::exec::NDJSON;
use super::files::PathQuery;
use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery};
use crate::status::{ApiError, file_error};

/// Time limit for the guest agent to begin a watch.
const BEGIN_LIMIT: Duration = Duration::from_secs(20);

/// Watches a file, or the entries of a directory.
///
/// The response has a line of JSON for each change after its head was sent. It ends when the
/// watched path is gone. The sandbox stays hot meanwhile.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/files/watch", tag = "files", params(("sandbox" = String, Path), PathQuery),
    responses((status = 200, body = FileChange, content_type = "application/x-ndjson"), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn watch(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiQuery(PathQuery { path, user }): ApiQuery<PathQuery>,
) -> Result<Response, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    let agent = used.agent.acting_as(user.as_deref());
    let mut events = agent.watch(&path).await.map_err(file_error)?;
    // The first event says that the watch is active, or why it is not.
    let began = timeout(BEGIN_LIMIT, events.next()).await;
    began.unwrap_or(Err(CallError::Silent { limit: BEGIN_LIMIT })).map_err(file_error)?;
    let watch = Watch { events, state, path_is_gone: false, _used: used };
    let body = stream::unfold(watch, |mut watch| async move {
        let line = watch.next().await?;
        Some((line, watch))
    });
    Ok(([(CONTENT_TYPE, NDJSON)], Body::from_stream(body)).into_response())
}

struct Watch {
    events: FileEvents,
    state: AppState,
    /// Whether the last event was that the watched path itself is gone.
    path_is_gone: bool,
    _used: SandboxUse,
}

impl Watch {
    /// Returns the next change as a line. If the sandbox is lost, returns an error, which cuts
    /// the response off.
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        let event = tokio::select! {
            event = self.events.next() => event,
            () = self.state.stopped() => return None,
        };
        match event {
            Ok(Some(event)) => {
                self.path_is_gone = event.kind == FileEventKind::Removed && event.name.is_none();
                Some(line(event))
            }
            Ok(None) if self.path_is_gone => None,
            // The sandbox or its guest agent has ended.
            Ok(None) => Some(Err(io::ErrorKind::ConnectionAborted.into())),
            Err(error) => Some(Err(io::Error::other(error))),
        }
    }
}

fn line(FileEvent { kind, name }: FileEvent) -> io::Result<Bytes> {
    let kind = match kind {
        FileEventKind::Created => FileChangeKind::Created,
        FileEventKind::Modified => FileChangeKind::Modified,
        FileEventKind::Attributes => FileChangeKind::Attributes,
        FileEventKind::Removed | FileEventKind::Moved => FileChangeKind::Removed,
        // A watch that begins again may have missed changes.
        FileEventKind::Overflow | FileEventKind::Watching => FileChangeKind::Overflow,
    };
    let mut line = serde_json::to_vec(&FileChange { kind, name })?;
    line.push(b'\n');
    Ok(line.into())
}
