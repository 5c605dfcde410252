//! Arguments in the words of a Dockerfile.
//!
//! Source: Docker's Dockerfile reference, "Environment replacement".

use std::collections::BTreeMap;

/// Maximum length of a text with its values, in bytes. Each argument can have the one before it
/// several times, so their lengths could grow without limit.
const EXPANDED_BYTES_MAX: usize = 4096;

/// Replaces `$NAME`, `${NAME}`, `${NAME:-DEFAULT}`, `${NAME-DEFAULT}`, `${NAME:+OTHER}` and
/// `${NAME+OTHER}`. An undefined name is empty. Returns `None` for other forms, and for texts that
/// are or become longer than 4 KiB.
pub(crate) fn expand(text: &str, values: &BTreeMap<String, String>) -> Option<String> {
    if text.len() > EXPANDED_BYTES_MAX {
        return None;
    }
    let mut expanded = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['$', '\\']) {
        if expanded.len() > EXPANDED_BYTES_MAX {
            return None;
        }
        expanded.push_str(&rest[..at]);
        let (sign, after) = rest[at..].split_at(1);
        if sign == "\\" {
            let mut characters = after.chars();
            expanded.extend(characters.next());
            rest = characters.as_str();
            continue;
        }
        if let Some(braced) = after.strip_prefix('{') {
            let (inside, following) = braced.split_at(closing_brace(braced)?);
            expanded.push_str(&value_of(inside, values)?);
            rest = &following[1..];
        } else {
            let (name, following) = after.split_at(name_length(after));
            if name.is_empty() {
                return None;
            }
            expanded.push_str(values.get(name).map(String::as_str).unwrap_or_default());
            rest = following;
        }
    }
    expanded.push_str(rest);
    (expanded.len() <= EXPANDED_BYTES_MAX).then_some(expanded)
}

/// Returns where the brace is that closes one before the text.
fn closing_brace(text: &str) -> Option<usize> {
    let mut open = 1;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => open += 1,
            b'}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return Some(at);
        }
    }
    None
}

/// Returns the value of what is between braces.
fn value_of(inside: &str, values: &BTreeMap<String, String>) -> Option<String> {
    let (name, operation) = inside.split_at(name_length(inside));
    if name.is_empty() {
        return None;
    }
    let value = values.get(name);
    let (counts_empty, operation) = match operation.strip_prefix(':') {
        Some(operation) => (false, operation),
        None => (true, operation),
    };
    let is_set = value.is_some_and(|value| counts_empty || !value.is_empty());
    let value = value.cloned().unwrap_or_default();
    match operation.chars().next() {
        None if counts_empty => Some(value),
        Some('-') if is_set => Some(value),
        Some('+') if !is_set => Some(String::new()),
        Some('-' | '+') => expand(&operation[1..], values),
        _ => None,
    }
}

fn name_length(text: &str) -> usize {
    let is_part = |(index, byte): &(usize, u8)| {
        byte.is_ascii_alphabetic() || *byte == b'_' || (*index > 0 && byte.is_ascii_digit())
    };
    text.bytes().enumerate().take_while(is_part).count()
}

/// Returns the names of an `ARG` instruction, with their defaults.
pub(crate) fn assignments(text: &str) -> Vec<(String, Option<String>)> {
    let assigned = words(text).into_iter().map(|word| match word.split_once('=') {
        Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
        None => (word, None),
    });
    assigned.collect()
}

/// Splits a text at spaces that are not quoted, and removes the quotes.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for character in text.chars() {
        match (quote, character) {
            (None, '"' | '\'') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (Some(open), _) if open == character => quote = None,
            (None, _) if character.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_by_their_values_and_defaults() {
        let values: BTreeMap<String, String> =
            [("A", "1"), ("B_2", "two"), ("EMPTY", "")].map(|(a, b)| (a.into(), b.into())).into();
        for (text, expected) in [
            ("plain", Some("plain")),
            ("x:$A", Some("x:1")),
            ("$A$B_2.", Some("1two.")),
            ("${A}-${NONE}-", Some("1--")),
            ("${NONE:-d}${EMPTY:-e}${EMPTY-f}", Some("de")),
            ("${A:+yes}${NONE:+no}${EMPTY+set}", Some("yesset")),
            ("${NONE:-$A}", Some("1")),
            ("${NONE:-${NONE:-${A}}}x", Some("1x")),
            (r"\$A", Some("$A")),
            ("${A#1}", None),
            ("${A:}", None),
            ("${A", None),
            ("$", None),
        ] {
            assert_eq!(expand(text, &values).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn texts_do_not_grow_without_limit() {
        let mut values = BTreeMap::from([("A".to_owned(), "x".repeat(1000))]);
        let longer = expand("$A$A$A$A", &values).unwrap();
        values.insert("B".to_owned(), longer);
        assert_eq!(expand("$B$B", &values), None);
        assert_eq!(expand(&"$B".repeat(2000), &values), None);
        assert_eq!(expand(&"${A:-".repeat(100_000), &values), None);
    }

    #[test]
    fn arguments_may_be_quoted_and_several() {
        let found = assignments(r#"A B="x y" C='' D=1=2"#);
        let expected = [("A", None), ("B", Some("x y")), ("C", Some("")), ("D", Some("1=2"))];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
        assert_eq!(found, expected);
    }
}
