//! What goes to standard output: an aligned table for people, JSON for programs.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::args::Output;

/// Rows under headings. A column is right-aligned when its heading starts with `>`.
pub struct Table {
    headings: Vec<(String, bool)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(headings: &[&str]) -> Self {
        let headings = headings
            .iter()
            .map(|h| h.strip_prefix('>').map_or_else(|| ((*h).to_string(), false), |h| (h.to_string(), true)))
            .collect();
        Self { headings, rows: Vec::new() }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut cells: Vec<String> = cells.into_iter().map(|c| printable(&c)).collect();
        cells.resize(self.headings.len(), String::new());
        self.rows.push(cells);
    }

    /// Columns two spaces apart, without trailing blanks.
    pub fn render(&self) -> String {
        let mut widths: Vec<usize> = self.headings.iter().map(|(h, _)| h.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut out = String::new();
        let headings: Vec<String> = self.headings.iter().map(|(h, _)| h.clone()).collect();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, width), (_, right)) in row.iter().zip(&widths).zip(&self.headings) {
                let pad = " ".repeat(width - cell.chars().count());
                if *right {
                    line.push_str(&pad);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    line.push_str(&pad);
                }
                line.push_str("  ");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// Text of guests and other hosts must not drive the terminal: control characters become spaces.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// As [`printable`], but for lines and tabs.
pub fn printable_lines(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { ' ' } else { c }).collect()
}

/// Prints a value as JSON, or what `table` makes of it.
pub fn print<T: Serialize>(output: Output, value: &T, table: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    match output {
        Output::Json => {
            let mut text = serde_json::to_string_pretty(value)?;
            text.push('\n');
            write_out(&text)
        }
        Output::Table => write_out(&table(value)),
    }
}

/// For what leaves nothing to show: nothing for people, `{"deleted": …}` for programs.
pub fn print_deleted(output: Output, what: &str) -> anyhow::Result<()> {
    print(output, &serde_json::json!({ "deleted": what }), |_| String::new())
}

/// Writes to standard output. A reader that has gone away (`| head`) is no error: the program ends with status 0.
pub fn write_out(text: &str) -> anyhow::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

/// Progress goes to standard error, and as one updated line only on a terminal.
pub fn on_terminal() -> bool {
    io::stderr().is_terminal()
}

/// `12.3 s`, `4 min 5 s`, `2 h 3 min`.
pub fn duration(microseconds: u64) -> String {
    let seconds = microseconds as f64 / 1e6;
    match seconds as u64 {
        0..=9 => format!("{seconds:.2} s"),
        10..=59 => format!("{seconds:.1} s"),
        s @ 60..=3599 => format!("{} min {} s", s / 60, s % 60),
        s @ 3600..=86_399 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        s => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_trailing_blanks() {
        let mut table = Table::new(&["NAME", ">SIZE", "STATE"]);
        table.row(["a".into(), "1".into(), "on".into()]);
        table.row(["longer".into(), "100".into()]);
        assert_eq!(table.render(), "NAME    SIZE  STATE\na          1  on\nlonger   100\n");
    }

    #[test]
    fn a_guest_cannot_send_escape_sequences_to_the_terminal() {
        assert_eq!(printable("a\x1b[31mb\n"), "a [31mb ");
        assert_eq!(printable_lines("a\x1b[31m\tb\r\n"), "a [31m\tb \n");
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(1_234_000), "1.23 s");
        assert_eq!(duration(12_340_000), "12.3 s");
        assert_eq!(duration(125_000_000), "2 min 5 s");
        assert_eq!(duration(7_500_000_000), "2 h 5 min");
    }
}
