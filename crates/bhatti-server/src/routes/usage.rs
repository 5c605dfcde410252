//! `/usage`: host resources that sandboxes use.

use axum::Extension;
use axum::extract::State;
use bhatti_api::Usage;

use crate::AppState;
use crate::auth::Caller;
use crate::page::{Page, PageQuery, Paging};
use crate::status::ApiError;

/// Returns the host resources that each of the caller's sandboxes with a VM uses. The request
/// wakes no sandbox, and keeps none hot.
#[utoipa::path(get, operation_id = "usage", path = "/usage", tag = "sandboxes", params(PageQuery),
    responses((status = 200, body = Vec<Usage>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<Usage>, ApiError> {
    let mut used = state.control.usage(owner).await?;
    used.sort_by_key(|(sandbox, _)| sandbox.to_string());
    let page = paging.by_key(used, |(sandbox, _)| sandbox.to_string());
    Ok(page.map(|(sandbox, usage)| Usage {
        sandbox_id: sandbox.to_string(),
        cpu_ms: u64::try_from(usage.cpu.as_millis()).unwrap_or(u64::MAX),
        memory_bytes: usage.memory_bytes,
    }))
}
