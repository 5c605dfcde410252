//! Tables: aligned for a person, one tab between columns for a program.

use anstyle::Style;
use jiff::Timestamp;
use unicode_width::UnicodeWidthStr;

use super::human::{one_line, since, whole_seconds};
use super::paint::{Paint, of_state};

/// The layout of a list of resources.
pub(crate) struct Table<T> {
    /// The column titles.
    pub(crate) header: &'static [&'static str],
    /// Returns the cells of one resource.
    pub(crate) row: fn(&T) -> Vec<Cell>,
    /// Returns the name of one resource, for quiet output.
    pub(crate) key: fn(&T) -> String,
}

/// One cell of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    /// Text.
    Text(String),
    /// A state, which is colored.
    State(String),
    /// A time in RFC 3339, shown relative to now on a terminal.
    Time(String),
}

impl<S: Into<String>> From<S> for Cell {
    fn from(text: S) -> Self {
        Self::Text(text.into())
    }
}

impl Cell {
    /// Creates a cell with a number.
    pub(crate) fn number(number: u64) -> Self {
        Self::Text(number.to_string())
    }

    fn shown(&self, terminal: bool, now: Timestamp) -> String {
        match self {
            Self::Text(text) | Self::State(text) => one_line(text),
            Self::Time(time) if terminal => since(time, now),
            Self::Time(time) => whole_seconds(time),
        }
    }

    fn style(&self) -> Style {
        match self {
            Self::State(text) => of_state(text),
            Self::Text(_) | Self::Time(_) => Style::new(),
        }
    }
}

impl<T> Table<T> {
    pub(super) fn text(&self, items: &[T], terminal: bool, paint: Paint) -> String {
        let now = Timestamp::now();
        let header = self.header.iter().map(|&title| Cell::from(title)).collect();
        let rows: Vec<Vec<Cell>> =
            std::iter::once(header).chain(items.iter().map(self.row)).collect();
        let shown: Vec<Vec<String>> = rows
            .iter()
            .map(|row| row.iter().map(|cell| cell.shown(terminal, now)).collect())
            .collect();
        if !terminal {
            return shown.iter().map(|row| row.join("\t") + "\n").collect();
        }
        let width = |column: usize| shown.iter().map(|row| row[column].width()).max();
        let widths: Vec<usize> =
            (0..self.header.len()).map(|column| width(column).unwrap_or_default()).collect();
        let lines = rows.iter().zip(&shown).map(|(cells, texts)| {
            let columns = cells.iter().zip(texts).zip(&widths).map(|((cell, text), width)| {
                let gap = " ".repeat(width - text.width());
                paint.styled(text, cell.style()) + &gap
            });
            columns.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        });
        lines.collect()
    }
}

/// Formats facts about one resource, one per line.
pub(crate) fn facts(facts: &[(&'static str, Cell)], terminal: bool, paint: Paint) -> String {
    let now = Timestamp::now();
    let width = facts.iter().map(|(name, _)| name.len() + 1).max().unwrap_or_default();
    let lines = facts.iter().map(|(name, cell)| {
        let label = format!("{:width$}", format!("{name}:"));
        let value = paint.styled(&cell.shown(terminal, now), cell.style());
        format!("{}  {value}\n", paint.dim(&label))
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Paint = Paint { colored: false };
    const COLORED: Paint = Paint { colored: true };

    const TABLE: Table<(&str, &str)> = Table {
        header: &["NAME", "STATE", "CREATED"],
        row: |(name, state)| {
            vec![
                (*name).into(),
                Cell::State((*state).into()),
                Cell::Time("2026-01-02T03:04:05.5Z".into()),
            ]
        },
        key: |(name, _)| (*name).to_owned(),
    };

    #[test]
    fn columns_are_aligned_on_a_terminal_and_separated_by_tabs_otherwise() {
        let items = [("a-long-name", "running (hot)"), ("b\x1b[2J", "stopped")];

        let lines = TABLE.text(&items, true, PLAIN);
        let columns: Vec<_> = lines.lines().map(|line| line.find(['S', 'r', 's'])).collect();
        assert!(lines.starts_with("NAME         STATE          CREATED\n"), "{lines}");
        assert_eq!(columns[0], Some(13));
        assert!(lines.contains(" days ago\n") && !lines.contains('\x1b'), "{lines}");

        assert_eq!(
            TABLE.text(&items, false, PLAIN),
            "NAME\tSTATE\tCREATED\na-long-name\trunning (hot)\t2026-01-02T03:04:06Z\nb\u{fffd}[2J\tstopped\t2026-01-02T03:04:06Z\n"
        );
    }

    #[test]
    fn wide_characters_take_two_columns() {
        let lines = TABLE.text(&[("名前", "stopped"), ("name", "stopped")], true, PLAIN);
        let names: Vec<_> = lines.lines().map(|line| line.split("  ").next()).collect();
        assert_eq!(names, [Some("NAME"), Some("名前"), Some("name")]);
    }

    #[test]
    fn colors_do_not_move_columns() {
        let items = [("a", "running (hot)"), ("b", "creating")];
        let plain = TABLE.text(&items, true, PLAIN);

        let colored = TABLE.text(&items, true, COLORED);

        assert_ne!(colored, plain);
        let stripped = colored.replace("\x1b[32m", "").replace("\x1b[0m", "");
        assert_eq!(stripped, plain);
    }

    #[test]
    fn facts_are_aligned() {
        let all = [("id", Cell::from("1")), ("created", Cell::Time("2026-01-02T03:04:05Z".into()))];
        assert_eq!(facts(&all, false, PLAIN), "id:       1\ncreated:  2026-01-02T03:04:05Z\n");
    }
}
