//! Labels: what a person or program notes on a sandbox, to find it again.

use std::collections::BTreeMap;

/// The most labels of one sandbox.
const LABELS_MAX: usize = 16;

/// The longest segment of a key: what is before or behind its one `/`.
const SEGMENT_BYTES_MAX: usize = 63;

/// The longest value.
const VALUE_BYTES_MAX: usize = 256;

/// Keys that begin so are ours.
const RESERVED_PREFIX: &str = "bhatti.sh/";

/// A label that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLabel {
    /// Its key is none.
    #[error(
        "invalid label key {key:?}: at most {SEGMENT_BYTES_MAX} letters, digits, `.`, `_` or `-`, with one optional prefix and `/` before"
    )]
    Key {
        /// The key as given.
        key: String,
    },
    /// Its key is ours.
    #[error("invalid label key {key:?}: keys that begin with `{RESERVED_PREFIX}` are reserved")]
    Reserved {
        /// The key as given.
        key: String,
    },
    /// Its value is none.
    #[error(
        "invalid value of label `{key}`: at most {VALUE_BYTES_MAX} letters, digits, `.`, `_` or `-`"
    )]
    Value {
        /// The label whose value it is.
        key: String,
    },
    /// There are too many.
    #[error("{count} labels are too many: a sandbox has at most {LABELS_MAX}")]
    TooMany {
        /// How many there would be.
        count: usize,
    },
}

/// The labels of a sandbox, in the order of their keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// The labels.
    #[must_use]
    pub const fn as_map(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// Gives the labels away.
    #[must_use]
    pub fn into_map(self) -> BTreeMap<String, String> {
        self.0
    }

    /// These labels with others laid over them; a key without a value is taken away.
    ///
    /// # Errors
    ///
    /// Returns what is wrong with the result.
    pub fn changed(self, change: BTreeMap<String, Option<String>>) -> Result<Self, InvalidLabel> {
        let mut labels = self.0;
        for (key, value) in change {
            match value {
                Some(value) => drop(labels.insert(key, value)),
                None => drop(labels.remove(&key)),
            }
        }
        Self::try_from(labels)
    }
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = InvalidLabel;

    fn try_from(labels: BTreeMap<String, String>) -> Result<Self, InvalidLabel> {
        if labels.len() > LABELS_MAX {
            return Err(InvalidLabel::TooMany { count: labels.len() });
        }
        for (key, value) in &labels {
            if key.starts_with(RESERVED_PREFIX) {
                return Err(InvalidLabel::Reserved { key: key.clone() });
            }
            let (prefix, name) = key.split_once('/').unwrap_or(("x", key));
            if ![prefix, name].iter().all(|segment| is_segment(segment)) {
                return Err(InvalidLabel::Key { key: key.chars().take(200).collect() });
            }
            if value.len() > VALUE_BYTES_MAX || !value.bytes().all(is_allowed) {
                return Err(InvalidLabel::Value { key: key.clone() });
            }
        }
        Ok(Self(labels))
    }
}

fn is_segment(text: &str) -> bool {
    (1..=SEGMENT_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_allowed)
}

const fn is_allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(key: &str, value: &str) -> Result<Labels, InvalidLabel> {
        Labels::try_from(BTreeMap::from([(key.to_owned(), value.to_owned())]))
    }

    #[test]
    fn usual_labels_are_labels() {
        for (key, value) in [("team", "a"), ("example.com/run_id", "2026-11-24"), ("k", "")] {
            assert!(labels(key, value).is_ok(), "{key}={value}");
        }
    }

    #[test]
    fn bad_labels_are_refused() {
        let long = "x".repeat(64);
        for key in ["", "a b", "/a", "a/", "a/b/c", "é", "a=b", &long] {
            assert!(matches!(labels(key, "v"), Err(InvalidLabel::Key { .. })), "{key}");
        }
        assert!(matches!(labels("bhatti.sh/x", ""), Err(InvalidLabel::Reserved { .. })));
        assert!(matches!(labels("k", "a b"), Err(InvalidLabel::Value { .. })));
        let many: BTreeMap<_, _> =
            (0..17).map(|number| (number.to_string(), String::new())).collect();
        assert_eq!(Labels::try_from(many), Err(InvalidLabel::TooMany { count: 17 }));
    }

    #[test]
    fn change_adds_replaces_and_removes() {
        let before = labels("a", "1")
            .unwrap()
            .changed([("b".to_owned(), Some("2".to_owned())), ("a".to_owned(), None)].into());

        assert_eq!(before, labels("b", "2"));
    }
}
