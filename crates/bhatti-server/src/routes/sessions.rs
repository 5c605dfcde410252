//! `/sandboxes/{sandbox}/sessions`: processes that survive their client.

use axum::Extension;
use axum::extract::State;
use bhatti_agent::CallError;
use bhatti_api::{Deleted, ErrorCode, Session};
use bhatti_node::SandboxUse;
use bhatti_proto::{ErrorKind, SessionInfo};

use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::json::Json;
use crate::page::{Page, PageQuery, Paging};
use crate::status::ApiError;
use crate::times::rfc3339;

/// Lists terminal sessions and jobs, oldest first.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/sessions", tag = "sessions", params(PageQuery, ("sandbox" = String, Path)),
    responses((status = 200, body = Vec<Session>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    paging: Paging,
) -> Result<Page<Session>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    let sessions = used.agent.list_sessions().await?;
    Ok(paging.in_order(sessions, |session| &session.session_id)?.map(session))
}

/// Kills a session's process.
#[utoipa::path(delete, path = "/sandboxes/{sandbox}/sessions/{session}", tag = "sessions",
    params(("sandbox" = String, Path), ("session" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn kill(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath((id_or_name, id)): ApiPath<(String, String)>,
) -> Result<Json<Deleted>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    used.agent.kill_session(&id).await.map_err(of_session(&used, &id))?;
    Ok(Json(Deleted { status: "killed".to_owned() }))
}

fn session(info: SessionInfo) -> Session {
    Session {
        session_id: info.session_id,
        argv: info.argv,
        tty: info.tty,
        running: info.running,
        exit_code: info.exit_code,
        attached: info.attached,
        created_at: rfc3339(info.created_at),
    }
}

/// Converts the guest agent's error about a session, and adds the session's id.
pub(super) fn of_session<'a>(
    used: &'a SandboxUse,
    id: &'a str,
) -> impl FnOnce(CallError) -> ApiError + 'a {
    move |error| match &error {
        CallError::Agent(refused) if refused.kind == ErrorKind::NoSuchSession => {
            ApiError::new(ErrorCode::NotFound, format!("session `{id}` not found"))
                .hint(format!("list them: bhatti jobs {}", used.id))
        }
        _ => error.into(),
    }
}
