//! The records of a PAX header: `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record.
//!
//! Source: POSIX.1-2017, `pax`, "pax Extended Header"; the GNU tar manual, "Sparse Formats".

use super::LayerError;

/// Prefix of the keys of extended attributes.
const ATTRIBUTE: &[u8] = b"SCHILY.xattr.";

/// What a PAX header says about the entry that follows it.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) name: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) user: Option<i64>,
    pub(super) group: Option<i64>,
    pub(super) time: Option<i64>,
    /// Names and values of extended attributes.
    pub(super) attributes: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseRecords,
}

/// What it says about a sparse file.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    /// The entry's own name is a made-up one.
    pub(super) name: Option<Vec<u8>>,
    /// Size with holes.
    pub(super) real_size: Option<u64>,
    /// The segments of formats 0.0 and 0.1.
    pub(super) segments: Vec<(u64, u64)>,
    /// The segments are at the start of the content (format 1.0).
    pub(super) has_map_in_content: bool,
    /// An offset of format 0.0, until its length follows.
    offset: Option<u64>,
}

impl Pax {
    pub(super) fn parse(mut records: &[u8]) -> Result<Self, LayerError> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let (record, rest) = split_record(records)?;
            let at = record.iter().position(|byte| *byte == b'=').ok_or_else(malformed)?;
            pax.set(&record[..at], &record[at + 1..])?;
            records = rest;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), LayerError> {
        match key {
            b"path" => self.name = Some(without_zeros(value)?),
            b"linkpath" => self.link = Some(without_zeros(value)?),
            b"size" => self.size = Some(parse(value)?),
            b"uid" => self.user = Some(parse(value)?),
            b"gid" => self.group = Some(parse(value)?),
            b"mtime" => self.time = Some(seconds(value)?),
            b"GNU.sparse.name" => self.sparse.name = Some(without_zeros(value)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.real_size = Some(parse(value)?);
            }
            b"GNU.sparse.map" => self.sparse.segments = segments(value)?,
            b"GNU.sparse.offset" => self.sparse.offset = Some(parse(value)?),
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or_else(malformed)?;
                self.sparse.segments.push((offset, parse(value)?));
            }
            b"GNU.sparse.major" => self.sparse.has_map_in_content = value == b"1",
            _ => {
                if let Some(name) = key.strip_prefix(ATTRIBUTE) {
                    self.attributes.push((without_zeros(name)?, value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

fn malformed() -> LayerError {
    LayerError::Format("a PAX header is malformed")
}

/// Splits the first record from `records`. Returns it without its length and line feed.
fn split_record(records: &[u8]) -> Result<(&[u8], &[u8]), LayerError> {
    let space = records.iter().position(|byte| *byte == b' ').ok_or_else(malformed)?;
    let length: usize = parse(&records[..space])?;
    let (record, rest) = records.split_at_checked(length).ok_or_else(malformed)?;
    let record = record.get(space + 1..).and_then(|record| record.strip_suffix(b"\n"));
    Ok((record.ok_or_else(malformed)?, rest))
}

fn without_zeros(value: &[u8]) -> Result<Vec<u8>, LayerError> {
    if value.contains(&0) { Err(malformed()) } else { Ok(value.to_vec()) }
}

fn parse<T: std::str::FromStr>(value: &[u8]) -> Result<T, LayerError> {
    let text = std::str::from_utf8(value).map_err(|_| malformed())?;
    text.parse().map_err(|_| malformed())
}

/// Parses a time with a fraction. Returns the second that it lies in.
fn seconds(value: &[u8]) -> Result<i64, LayerError> {
    let mut parts = value.splitn(2, |byte| *byte == b'.');
    let whole: i64 = parse(parts.next().unwrap_or_default())?;
    let has_fraction = parts.next().is_some_and(|part| part.iter().any(|digit| *digit != b'0'));
    let is_negative = value.starts_with(b"-");
    Ok(if is_negative && has_fraction { whole.saturating_sub(1) } else { whole })
}

/// Parses the map of format 0.1: `OFFSET,LENGTH,OFFSET,LENGTH…`.
fn segments(value: &[u8]) -> Result<Vec<(u64, u64)>, LayerError> {
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let numbers: Vec<u64> =
        value.split(|byte| *byte == b',').map(parse).collect::<Result<_, _>>()?;
    let (pairs, rest) = numbers.as_chunks::<2>();
    if rest.is_empty() {
        Ok(pairs.iter().map(|&[a, b]| (a, b)).collect())
    } else {
        Err(malformed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &str) -> String {
        let rest = format!(" {key}={value}\n");
        let length = (1..).find(|length| length.to_string().len() + rest.len() == *length).unwrap();
        format!("{length}{rest}")
    }

    #[test]
    fn records_are_parsed_and_malformed_ones_refused() {
        let text = [
            record("path", "a=b\nc"),
            record("mtime", "-1.5"),
            record("uid", "4000000000"),
            record("SCHILY.xattr.user.note", "line\nline"),
            record("GNU.sparse.offset", "0"),
            record("GNU.sparse.numbytes", "512"),
            record("comment", "ignored"),
        ];
        let pax = Pax::parse(text.concat().as_bytes()).unwrap();

        assert_eq!(pax.name.unwrap(), b"a=b\nc");
        assert_eq!((pax.time, pax.user), (Some(-2), Some(4_000_000_000)));
        assert_eq!(pax.attributes, [(b"user.note".to_vec(), b"line\nline".to_vec())]);
        assert_eq!(pax.sparse.segments, [(0, 512)]);

        let zero = record("path", "a\0b");
        let odd_map = record("GNU.sparse.map", "0,1,2");
        for malformed in
            ["5 path=a\n", "99 a=b\n", "x a=b\n", "6 a=bc", "", &zero, &odd_map, "3 a\n"]
        {
            let parsed = Pax::parse(malformed.as_bytes());
            assert!(parsed.is_err() || malformed.is_empty(), "{malformed:?}");
        }
    }
}
