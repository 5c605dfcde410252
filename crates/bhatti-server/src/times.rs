//! Times in responses.

use jiff::Timestamp;

/// Returns a time, in seconds since 1970, as text (RFC 3339). A time beyond the year 9999, which
/// only a guest reports, becomes the last one before.
pub(crate) fn rfc3339(seconds: impl TryInto<i64>) -> String {
    let seconds = seconds.try_into().unwrap_or(i64::MAX);
    let at = Timestamp::from_second(seconds);
    let nearest = if seconds < 0 { Timestamp::MIN } else { Timestamp::MAX };
    at.unwrap_or(nearest).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_seconds_is_a_time() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(1_800_000_000_u64), "2027-01-15T08:00:00Z");
        for (seconds, year) in [(i64::MAX, "9999-"), (i64::MIN, "-009999-")] {
            assert!(rfc3339(seconds).starts_with(year), "{}", rfc3339(seconds));
        }
    }
}
