//! Writes down the description of the API.

use anyhow::Result;

/// Brings `docs/openapi.json` up to date. A test of the server says when that is needed.
pub(crate) fn run() -> Result<()> {
    let path = bhatti_testkit::repository().join("docs/openapi.json");
    let description = serde_json::to_string_pretty(&bhatti_server::open_api())? + "\n";
    std::fs::write(&path, &description)?;
    println!("{}: {} lines", path.display(), description.lines().count());
    Ok(())
}
