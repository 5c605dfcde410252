//! Labels: keys and values that users and programs set on a sandbox, to find it again.

use std::collections::BTreeMap;

/// Maximum of labels on one sandbox.
const LABELS_MAX: usize = 16;

/// Maximum length of a segment of a key, in bytes: the part before or after its one `/`.
const SEGMENT_BYTES_MAX: usize = 63;

/// Maximum length of a value, in bytes.
const VALUE_BYTES_MAX: usize = 256;

/// Prefix of the keys that are reserved for bhatti.
const RESERVED_PREFIX: &str = "bhatti.sh/";

/// Key of the label that says what bhatti uses a sandbox for.
const WORK: &str = "bhatti.sh/work";

/// Value of [`WORK`] for a build of an image.
const BUILD: &str = "build";

/// An invalid label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLabel {
    /// The key is malformed.
    #[error(
        "invalid label key {key:?}: at most {SEGMENT_BYTES_MAX} letters, digits, `.`, `_` or `-`, with one optional prefix and `/` before"
    )]
    Key {
        /// The key as given.
        key: String,
    },
    /// The key is reserved.
    #[error("invalid label key {key:?}: keys that begin with `{RESERVED_PREFIX}` are reserved")]
    Reserved {
        /// The key as given.
        key: String,
    },
    /// The value is malformed.
    #[error(
        "invalid value of label `{key}`: at most {VALUE_BYTES_MAX} letters, digits, `.`, `_` or `-`"
    )]
    Value {
        /// The label's key.
        key: String,
    },
    /// There are too many labels.
    #[error("{count} labels are too many: a sandbox has at most {LABELS_MAX}")]
    TooMany {
        /// The number of labels that the sandbox would have.
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

    /// Returns the labels of a sandbox in which an image is built.
    #[must_use]
    pub fn of_build() -> Self {
        Self([(WORK.to_owned(), BUILD.to_owned())].into())
    }

    /// Whether an image is built in the sandbox.
    #[must_use]
    pub fn is_of_build(&self) -> bool {
        self.0.get(WORK).is_some_and(|work| work == BUILD)
    }

    /// Returns labels that were valid when they were stored, also those of bhatti itself.
    ///
    /// # Errors
    ///
    /// Returns an error if they are not valid.
    pub fn stored(labels: BTreeMap<String, String>) -> Result<Self, InvalidLabel> {
        check(&labels)?;
        Ok(Self(labels))
    }

    /// Converts the labels into a map.
    #[must_use]
    pub fn into_map(self) -> BTreeMap<String, String> {
        self.0
    }

    /// Applies changes to these labels: sets keys that have a value, and removes keys that have
    /// none.
    ///
    /// # Errors
    ///
    /// Returns an error if the result is not valid.
    pub fn changed(self, change: BTreeMap<String, Option<String>>) -> Result<Self, InvalidLabel> {
        let mut labels = self.0;
        for (key, value) in change {
            refuse_reserved(&key)?;
            match value {
                Some(value) => drop(labels.insert(key, value)),
                None => drop(labels.remove(&key)),
            }
        }
        Self::stored(labels)
    }
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = InvalidLabel;

    fn try_from(labels: BTreeMap<String, String>) -> Result<Self, InvalidLabel> {
        labels.keys().try_for_each(|key| refuse_reserved(key))?;
        Self::stored(labels)
    }
}

fn refuse_reserved(key: &str) -> Result<(), InvalidLabel> {
    if key.starts_with(RESERVED_PREFIX) {
        return Err(InvalidLabel::Reserved { key: key.to_owned() });
    }
    Ok(())
}

fn check(labels: &BTreeMap<String, String>) -> Result<(), InvalidLabel> {
    if labels.len() > LABELS_MAX {
        return Err(InvalidLabel::TooMany { count: labels.len() });
    }
    for (key, value) in labels {
        let (prefix, name) = key.split_once('/').unwrap_or(("x", key));
        if ![prefix, name].iter().all(|segment| is_segment(segment)) {
            return Err(InvalidLabel::Key { key: key.chars().take(200).collect() });
        }
        if value.len() > VALUE_BYTES_MAX || !value.bytes().all(is_allowed) {
            return Err(InvalidLabel::Value { key: key.clone() });
        }
    }
    Ok(())
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
    fn valid_labels_are_accepted() {
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
