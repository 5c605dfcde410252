//! `bhatti version`.

use serde_json::json;

use super::Context;
use crate::error::CliError;

pub(crate) fn run(context: &Context) -> Result<(), CliError> {
    let version = env!("CARGO_PKG_VERSION");
    context.output.show(&json!({ "version": version }), |_| format!("bhatti {version}"))
}
