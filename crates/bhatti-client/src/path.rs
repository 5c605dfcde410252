//! Paths of the API.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// The characters that are encoded in a segment.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// Returns a path below a sandbox.
pub(crate) fn sandbox_path(sandbox: &str, rest: &str) -> String {
    segment_path("/sandboxes/", sandbox, rest)
}

/// Returns a path with a segment that a person typed. The typed text may contain any character,
/// so it is percent-encoded to stay one segment.
pub(crate) fn segment_path(before: &str, typed: &str, rest: &str) -> String {
    format!("{before}{}{rest}", utf8_percent_encode(typed, ENCODED))
}

/// Returns a path with a query.
pub(crate) fn with_query<'a>(
    path: &str,
    pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> String {
    let pairs: Vec<_> = pairs.into_iter().collect();
    // Encoding pairs of text never fails.
    match serde_html_form::to_string(pairs) {
        Ok(query) if !query.is_empty() => format!("{path}?{query}"),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_text_stays_one_segment_of_the_path() {
        assert_eq!(sandbox_path("dev.v2", "/exec"), "/sandboxes/dev.v2/exec");
        assert_eq!(sandbox_path("../users?x#y é", ""), "/sandboxes/..%2Fusers%3Fx%23y%20%C3%A9");
    }

    #[test]
    fn typed_text_stays_one_value_of_the_query() {
        assert_eq!(with_query("/a", []), "/a");
        assert_eq!(with_query("/a", [("path", "/x &y=é")]), "/a?path=%2Fx+%26y%3D%C3%A9");
    }
}
