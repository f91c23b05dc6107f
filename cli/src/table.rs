//! Tables that fit the terminal.

use crate::output::{Colour, paint};

/// Between columns.
const GAP: usize = 2;

/// No column is made narrower than this.
const NARROWEST: usize = 6;

/// One field of a row.
#[derive(Clone, Debug)]
pub struct Cell {
    text: String,
    colour: Option<Colour>,
}

impl Cell {
    /// Text in a colour. What could make a terminal do something is taken out.
    pub fn coloured(text: &str, colour: Option<Colour>) -> Self {
        let text = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        Self { text, colour }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::coloured(text.as_ref(), None)
    }
}

/// The lines of a table with a header. Where `width` is given, the widest column is shortened until a line fits, as far as
/// columns stay readable.
pub fn render<const N: usize>(
    header: [&str; N],
    rows: &[[Cell; N]],
    width: Option<usize>,
    colour: bool,
) -> String {
    let mut widths = header.map(|title| title.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.text.chars().count());
        }
    }
    if let Some(width) = width {
        fit(&mut widths, width);
    }
    let header = header.map(Cell::from);
    std::iter::once(&header).chain(rows).map(|row| line(row, &widths, colour)).collect()
}

fn fit(widths: &mut [usize], total: usize) {
    loop {
        let now = widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
        match widths.iter_mut().max() {
            Some(widest) if now > total && *widest > NARROWEST => *widest -= 1,
            _ => return,
        }
    }
}

fn line(row: &[Cell], widths: &[usize], colour: bool) -> String {
    let mut line = String::new();
    let last = row.len().saturating_sub(1);
    for (i, (cell, &width)) in row.iter().zip(widths).enumerate() {
        let text = shorten(&cell.text, width);
        let padding = if i == last { 0 } else { width - text.chars().count() + GAP };
        line += &match cell.colour {
            Some(tone) => paint(&text, tone, colour),
            None => text,
        };
        line.extend(std::iter::repeat_n(' ', padding));
    }
    line.push('\n');
    line
}

/// `text` in at most `width` characters, its end replaced by an ellipsis if it is longer.
pub fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept = text.chars().take(width.saturating_sub(1));
    kept.chain((width > 0).then_some('…')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(width: Option<usize>) -> String {
        let image = "registry.example.org/a/very/long/name:latest";
        let rows =
            [["box".into(), image.into(), "Running".into()], ["müller".into(), "x".into(), "Stopped".into()]];
        render(["NAME", "IMAGE", "STATUS"], &rows, width, false)
    }

    #[test]
    fn columns_line_up() {
        let wide = table(None);
        let lines: Vec<Vec<char>> = wide.lines().map(|line| line.chars().collect()).collect();
        assert_eq!(lines.len(), 3);
        for line in &lines {
            assert_eq!(line[7], ' ');
            assert_ne!(line[8], ' ');
        }
        assert!(wide.contains("registry.example.org/a/very/long/name:latest  Running\n"));
    }

    #[test]
    fn the_widest_column_gives_way() {
        for width in [24, 40, 58] {
            let narrow = table(Some(width));
            assert!(narrow.lines().all(|line| line.chars().count() <= width), "{narrow}");
            assert!(narrow.contains("box") && narrow.contains("Running") && narrow.contains('…'), "{narrow}");
        }
        // What cannot fit stays readable.
        assert!(table(Some(3)).contains("regis…"), "{}", table(Some(3)));
    }

    #[test]
    fn colours_do_not_count_and_controls_do_not_pass() {
        let rows = [[Cell::coloured("a\x1b[2J", Some(Colour::Red)), "b".into()]];
        assert_eq!(render(["X", "Y"], &rows, None, true), "X      Y\n\x1b[31ma\u{fffd}[2J\x1b[0m  b\n");
        assert_eq!(shorten("abc", 0), "");
        assert_eq!(shorten("abc", 3), "abc");
    }
}
