//! `bhatti destroy`.

use serde_json::json;

use super::Context;
use crate::cli::Targets;
use crate::error::CliError;

pub(super) async fn run(context: &Context, targets: &Targets) -> Result<(), CliError> {
    for sandbox in &targets.sandboxes {
        let deleted = context.client.destroy(sandbox).await?;
        context.output.show(&json!({ "sandbox": sandbox, "status": deleted.status }), |_| {
            format!("{} {sandbox}", deleted.status)
        })?;
    }
    Ok(())
}
