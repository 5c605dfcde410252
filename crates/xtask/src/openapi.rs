//! Writes the description of the API.

use anyhow::Result;

/// Updates `docs/openapi.json`. A test of the server fails if the file is out of date.
pub(crate) fn run() -> Result<()> {
    let path = bhatti_testkit::repository().join("docs/openapi.json");
    let description = serde_json::to_string_pretty(&bhatti_server::open_api())? + "\n";
    std::fs::write(&path, &description)?;
    println!("{}: {} lines", path.display(), description.lines().count());
    Ok(())
}
