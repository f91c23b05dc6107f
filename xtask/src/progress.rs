//! What the user sees while something takes long: a header for each step, its time when it is done, and one
//! line that keeps changing (on a terminal) or comes back every 20 seconds (in a log).

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;

/// Runs one step under a header and shows how long it took.
pub fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {title}");
    let start = Instant::now();
    let result = work();
    eprintln!("{}", end(title, &result, start));
    result
}

/// Runs one step beside others: header, what `work` gives to be shown, and time come in one piece at its end.
pub fn step_apart(title: &str, work: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<()> {
    let (start, mut text) = (Instant::now(), Vec::new());
    let result = work(&mut text);
    let mut stderr = std::io::stderr().lock();
    writeln!(stderr, "==> {title}")?;
    stderr.write_all(&text)?;
    writeln!(stderr, "{}", end(title, &result, start))?;
    result
}

fn end<T>(title: &str, result: &Result<T>, start: Instant) -> String {
    let how = if result.is_ok() { "done" } else { "failed" };
    format!("    {title}: {how} in {}", show(start.elapsed()))
}

/// Says one thing.
pub fn note(text: impl AsRef<str>) {
    eprintln!("    {}", text.as_ref());
}

/// A time as people read it.
pub fn show(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 => format!("{} ms", time.as_millis()),
        1..60 => format!("{:.1} s", time.as_secs_f64()),
        _ => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

/// The one line that keeps changing.
pub struct Ticker {
    terminal: bool,
    start: Instant,
    shown: Instant,
    every: Duration,
}

impl Ticker {
    /// Starts the clock.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let every = if terminal { Duration::from_millis(200) } else { Duration::from_secs(20) };
        let start = Instant::now();
        Self { terminal, start, shown: start, every }
    }

    /// Shows `text` if it is time again.
    pub fn tick(&mut self, text: impl FnOnce() -> String) {
        if self.shown.elapsed() < self.every {
            return;
        }
        self.shown = Instant::now();
        let text = format!("    {} {}", show(self.start.elapsed()), text());
        if self.terminal {
            let text: String = text.chars().take(100).collect();
            eprint!("\r{text}\x1b[K");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{text}");
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}
