//! What is being done while an image is fetched and a guest boots, on standard error: one changing line on a terminal,
//! and elsewhere nothing, or a line for each step where that is what was asked for.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use cubbyhole::{ImageProgress, Progress};

use crate::amount::bytes;
use crate::table::shorten;
use crate::terminal;

/// How often the line changes at most.
const PERIOD: Duration = Duration::from_millis(50);

/// How wide a bar is.
const BAR: usize = 24;

/// The line.
pub struct ProgressLine {
    image: String,
    layers: HashMap<String, (u64, u64)>,
    show: Show,
    drawn: Option<Instant>,
    /// The newest step that has a line of its own.
    said: String,
}

/// How much is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Show {
    Nothing,
    /// One line that changes.
    Line,
    /// A line for each step.
    Steps,
}

impl ProgressLine {
    /// Progress of what is done with `image`. Where standard error is no terminal, it is shown in `steps` or not at all.
    pub fn new(image: &str, quiet: bool, steps: bool) -> Self {
        let show = match (quiet, io::stderr().is_terminal(), steps) {
            (false, true, _) => Show::Line,
            (false, false, true) => Show::Steps,
            _ => Show::Nothing,
        };
        let image = crate::failure::clean(image);
        Self { image, layers: HashMap::new(), show, drawn: None, said: String::new() }
    }

    /// Shows what is being done.
    pub fn show(&mut self, progress: &Progress) {
        match self.show {
            Show::Nothing => return,
            Show::Steps => return self.say(progress),
            Show::Line => {}
        }
        // Counts may be left out, a new step may not.
        let counts = matches!(
            progress,
            Progress::Image(ImageProgress::Downloading { .. } | ImageProgress::Converting { .. })
        );
        let text = self.text(progress);
        if counts && self.drawn.is_some_and(|drawn| drawn.elapsed() < PERIOD) {
            return;
        }
        if let Some(text) = text {
            self.draw(&text);
        }
    }

    /// Shows how far something has come, unless it did so just now.
    pub fn note(&mut self, text: &str) {
        if self.show == Show::Line && self.drawn.is_none_or(|drawn| drawn.elapsed() >= PERIOD) {
            self.draw(text);
        }
    }

    fn text(&mut self, progress: &Progress) -> Option<String> {
        let image = &self.image;
        Some(match progress {
            Progress::Image(ImageProgress::Resolving) => format!("asking for {image}"),
            Progress::Image(ImageProgress::Waiting) => format!("waiting for somebody else to pull {image}"),
            Progress::Image(ImageProgress::Downloading { digest, bytes: done, total }) => {
                self.layers.insert(digest.to_string(), (*done, *total));
                let sums = self.layers.values().fold((0_u64, 0_u64), |(done, total), layer| {
                    (done.saturating_add(layer.0), total.saturating_add(layer.1))
                });
                format!("pulling {} {} of {}, {image}", bar(sums.0, sums.1), bytes(sums.0), bytes(sums.1))
            }
            Progress::Image(ImageProgress::Converting { bytes: done }) => {
                format!("converting {}, {image}", bytes(*done))
            }
            Progress::Image(ImageProgress::Done) => format!("{image} is here"),
            Progress::Booting => format!("booting {image}"),
            _ => return None,
        })
    }

    /// Says a step that was not said yet.
    fn say(&mut self, progress: &Progress) {
        if let Some(step) = self.step(progress).filter(|step| *step != self.said) {
            let _ = io::stderr().write_all(format!("{step}\n").as_bytes());
            self.said = step;
        }
    }

    fn step(&mut self, progress: &Progress) -> Option<String> {
        match progress {
            Progress::Image(ImageProgress::Downloading { digest, total, bytes: done }) => {
                let short: String = digest.hex().chars().take(12).collect();
                match self.layers.insert(digest.to_string(), (*done, *total)) {
                    None => Some(format!("pulling {short}, {}", bytes(*total))),
                    Some(before) => (done == total && before.0 < *total).then(|| format!("pulled {short}")),
                }
            }
            Progress::Image(ImageProgress::Converting { .. }) => Some(format!("converting {}", self.image)),
            progress => self.text(progress),
        }
    }

    fn draw(&mut self, text: &str) {
        let columns = terminal::size_or_classic().1;
        // The last column makes some terminals begin a new line.
        let text = shorten(text, usize::from(columns).saturating_sub(1));
        let _ = io::stderr().write_all(format!("\r{text}\x1b[K").as_bytes());
        self.drawn = Some(Instant::now());
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = io::stderr().write_all(b"\r\x1b[K");
        }
    }
}

fn bar(done: u64, total: u64) -> String {
    let share = u128::from(done.min(total)) * (BAR as u128) / u128::from(total.max(1));
    let full = usize::try_from(share).unwrap_or(BAR);
    format!("[{}{}]", "=".repeat(full), " ".repeat(BAR - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_the_share() {
        assert_eq!(bar(0, 100), format!("[{}]", " ".repeat(24)));
        assert_eq!(bar(50, 100), format!("[{}{}]", "=".repeat(12), " ".repeat(12)));
        assert_eq!(bar(u64::MAX, u64::MAX), format!("[{}]", "=".repeat(24)));
        assert_eq!(bar(9, 3), bar(3, 3));
        assert_eq!(bar(0, 0), bar(0, 1));
    }

    #[test]
    fn a_layer_has_a_line_when_it_begins_and_one_when_it_is_there() {
        let mut line = ProgressLine::new("x", false, true);
        let digest = "a".repeat(64);
        let mut step = |bytes| {
            let digest = format!("sha256:{digest}").parse().unwrap();
            line.step(&Progress::Image(ImageProgress::Downloading { digest, bytes, total: 2000 }))
        };
        assert_eq!(step(0).as_deref(), Some("pulling aaaaaaaaaaaa, 2.0 kB"));
        assert_eq!(step(1000), None);
        assert_eq!(step(2000).as_deref(), Some("pulled aaaaaaaaaaaa"));
        assert_eq!(step(2000), None);
    }

    #[test]
    fn nothing_is_shown_that_nobody_wants() {
        let mut line = ProgressLine::new("x", true, true);
        line.show(&Progress::Booting);
        assert!(line.drawn.is_none());
        assert_eq!(line.text(&Progress::Booting).as_deref(), Some("booting x"));
    }
}
