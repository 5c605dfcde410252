//! What this API keeps with a template, in the template's row, and the names of templates.

use bhatti_store::TemplateRow;
use bhatti_types::{ParseNameError, TemplateName};
use serde::{Deserialize, Serialize};

/// The tag that a name without a tag has.
pub(crate) const DEFAULT_TAG: &str = "default";

#[derive(Serialize, Deserialize)]
struct Annex {
    e2b: Kept,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    build: String,
}

/// Returns the text for the row of a template that a build makes.
pub(crate) fn of_build(id: &str) -> String {
    serde_json::to_string(&Annex { e2b: Kept { build: id.to_owned() } }).unwrap_or_default()
}

/// Returns the id of the build that made a template, a UUID. A template of the native API has one
/// that is derived from its own id.
pub(crate) fn build_id(row: &TemplateRow) -> String {
    let kept = row.annex.as_deref().and_then(|annex| serde_json::from_str::<Annex>(annex).ok());
    kept.map_or_else(|| uuid(&row.id.to_string()), |annex| annex.e2b.build)
}

/// Returns a UUID with these hexadecimal digits, of which 16 are used, and a random version.
pub(crate) fn uuid(digits: &str) -> String {
    let digits = format!("{digits:0<16.16}");
    format!("{}-{}-4000-8000-{}00000000", &digits[..8], &digits[8..12], &digits[12..16])
}

/// Splits a name and its tag.
pub(crate) fn split(name: &str) -> (&str, Option<&str>) {
    name.split_once(':').map_or((name, None), |(name, tag)| (name, Some(tag)))
}

/// Returns the name of a template with a tag. The default tag is in no name.
///
/// # Errors
///
/// Returns an error if the name or the tag has other characters than names have.
pub(crate) fn tagged(name: &str, tag: &str) -> Result<TemplateName, ParseNameError> {
    if tag == DEFAULT_TAG { name.parse() } else { format!("{name}:{tag}").parse() }
}

/// Returns the tag of a row, if it is of the template `name`.
pub(crate) fn tag_of<'a>(row: &'a TemplateRow, name: &str) -> Option<&'a str> {
    let (own, tag) = split(row.name.as_str());
    (own == name).then(|| tag.unwrap_or(DEFAULT_TAG))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_tag_is_in_no_name() {
        assert_eq!(tagged("a", "default").unwrap().as_str(), "a");
        assert_eq!(tagged("a", "v1.0").unwrap().as_str(), "a:v1.0");
        assert!(tagged("a", "v/1").is_err() && tagged("", "v1").is_err());
        assert_eq!((split("a:b"), split("a")), (("a", Some("b")), ("a", None)));
    }

    #[test]
    fn derived_ids_are_uuids() {
        assert_eq!(uuid("0123456789abcdef"), "01234567-89ab-4000-8000-cdef00000000");
    }
}
