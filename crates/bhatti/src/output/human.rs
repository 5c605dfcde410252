//! Sizes and times in a form for users.

use jiff::{Timestamp, Unit};

/// Formats a number of bytes, in the largest unit in which it is at least 1.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut scale, mut unit) = (1_u64, 0);
    while count / scale >= 1024 && unit + 1 < UNITS.len() {
        scale *= 1024;
        unit += 1;
    }
    let (whole, tenths) = (count / scale, count % scale * 10 / scale);
    if tenths == 0 || whole >= 100 {
        format!("{whole} {}", UNITS[unit])
    } else {
        format!("{whole}.{tenths} {}", UNITS[unit])
    }
}

/// Formats a number of mebibytes likewise.
pub(crate) fn mib(count: u64) -> String {
    bytes(count.saturating_mul(1 << 20))
}

/// Formats how long ago a time in RFC 3339 was.
pub(crate) fn since(time: &str, now: Timestamp) -> String {
    let Ok(then) = time.parse::<Timestamp>() else { return time.to_owned() };
    let seconds = now.as_second() - then.as_second();
    let (count, unit) = match seconds.unsigned_abs() {
        0 => return "now".to_owned(),
        seconds @ 1..60 => (seconds, "s"),
        seconds @ 60..3600 => (seconds / 60, "min"),
        seconds @ 3600..172_800 => (seconds / 3600, "h"),
        seconds => (seconds / 86_400, "days"),
    };
    if seconds < 0 { format!("in {count} {unit}") } else { format!("{count} {unit} ago") }
}

/// Formats seconds since 1970 in RFC 3339.
pub(crate) fn unix_time(seconds: i64) -> String {
    Timestamp::from_second(seconds).map(|time| time.to_string()).unwrap_or_default()
}

/// Rounds a time in RFC 3339 to the second.
pub(super) fn whole_seconds(time: &str) -> String {
    let rounded = time.parse::<Timestamp>().ok().and_then(|time| time.round(Unit::Second).ok());
    rounded.map_or_else(|| time.to_owned(), |time| time.to_string())
}

/// Replaces the control characters of text from a guest or a stranger, except line breaks and
/// tabs, so that the text cannot move the cursor or change the screen.
pub(crate) fn harmless(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c })
        .collect()
}

/// Does the same, and puts the text on one line, so that it cannot look like another row.
pub(crate) fn one_line(text: &str) -> String {
    harmless(text).replace(['\n', '\t'], "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let shown = [0, 1023, 1024, 1536, 10 << 20, 1_288_490_188, u64::MAX].map(bytes);
        assert_eq!(
            shown,
            ["0 B", "1023 B", "1 KiB", "1.5 KiB", "10 MiB", "1.1 GiB", "16777215 TiB"]
        );
        assert_eq!([mib(512), mib(4096), mib(1536)], ["512 MiB", "4 GiB", "1.5 GiB"]);
    }

    #[test]
    fn times_are_relative_to_now() {
        let now: Timestamp = "2026-03-04T05:06:07Z".parse().unwrap();
        let shown = [
            "2026-03-04T05:06:07Z",
            "2026-03-04T05:05:37.5Z",
            "2026-03-04T05:01:07Z",
            "2026-03-03T05:06:07Z",
            "2026-02-01T00:00:00Z",
            "2026-03-04T05:08:07Z",
            "yesterday",
        ]
        .map(|time| since(time, now));
        assert_eq!(
            shown,
            ["now", "30 s ago", "5 min ago", "24 h ago", "31 days ago", "in 2 min", "yesterday"]
        );
        assert_eq!(unix_time(0), "1970-01-01T00:00:00Z");
        assert_eq!(whole_seconds("2026-03-04T05:05:37.25Z"), "2026-03-04T05:05:37Z");
    }

    #[test]
    fn untrusted_text_cannot_control_the_screen() {
        assert_eq!(harmless("a\x1b[2J\r\nb\u{9b}c\t"), "a\u{fffd}[2J\u{fffd}\nb\u{fffd}c\t");
        assert_eq!(one_line("a\nb\tc"), "a\u{fffd}b\u{fffd}c");
    }
}
