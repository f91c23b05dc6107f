//! One changing line on standard error, while an image is fetched and a guest boots; nothing where nobody looks.

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
    shown: bool,
    drawn: Option<Instant>,
}

impl ProgressLine {
    /// A line about making a sandbox of `image`; none if it is not wanted or standard error is no terminal.
    pub fn new(image: &str, quiet: bool) -> Self {
        let image = crate::failure::clean(image);
        Self { image, layers: HashMap::new(), shown: !quiet && io::stderr().is_terminal(), drawn: None }
    }

    /// Shows what is being done.
    pub fn show(&mut self, progress: &Progress) {
        if !self.shown {
            return;
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
    fn nothing_is_shown_that_nobody_wants() {
        let mut line = ProgressLine::new("x", true);
        line.show(&Progress::Booting);
        assert!(line.drawn.is_none());
        assert_eq!(line.text(&Progress::Booting).as_deref(), Some("booting x"));
    }
}
