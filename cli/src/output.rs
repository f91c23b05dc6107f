//! Standard output and colour.

use std::io::{self, ErrorKind, IsTerminal, Write};

use crate::failure::Failure;

/// Colours, by what they mean to a terminal (ECMA-48, 8.3.117).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// Something is wrong.
    Red,
    /// All is well.
    Green,
    /// Look twice.
    Yellow,
}

/// Whether a stream gets colour: it is a terminal that has some, and nobody said `NO_COLOR` (no-color.org).
pub fn colour(terminal: bool) -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    terminal && !unwanted && !dumb
}

/// Whether standard output gets colour.
pub fn colour_on_stdout() -> bool {
    colour(io::stdout().is_terminal())
}

/// `text` in a colour, if there is to be any.
pub fn paint(text: &str, colour: Colour, wanted: bool) -> String {
    let number = match colour {
        Colour::Red => 31,
        Colour::Green => 32,
        Colour::Yellow => 33,
    };
    if wanted { format!("\x1b[{number}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Prints data. Success is the exit code 0.
pub fn print(bytes: &[u8]) -> Result<u8, Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(0),
        Err(error) => Err(unwritten(&error)),
    }
}

/// Prints JSON, indented, with a newline.
pub fn print_json(value: &serde_json::Value) -> Result<u8, Failure> {
    print(format!("{value:#}\n").as_bytes())
}

/// JSON on one line, in which nothing could make a terminal do something: control characters are found in strings only,
/// and JSON has an escape for them that means the same.
pub fn json_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        match c.is_control() {
            true => line.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => line.push(c),
        }
    }
    line.push('\n');
    line
}

/// Standard output cannot be written.
pub fn unwritten(error: &io::Error) -> Failure {
    match error.kind() {
        ErrorKind::BrokenPipe => Failure::unread(),
        _ => Failure::new(format!("cannot write to standard output: {error}")),
    }
}
