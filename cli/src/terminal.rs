//! This program's terminal: its size, and the mode in which every key is the guest's.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The size that a terminal has if nobody knows better.
const CLASSIC: (u16, u16) = (24, 80);

/// Rows and columns of the terminal behind standard input, output or error, whichever is one.
pub fn size() -> Option<(u16, u16)> {
    let sizes = [tcgetwinsize(io::stdin()), tcgetwinsize(io::stdout()), tcgetwinsize(io::stderr())];
    let size = sizes.into_iter().flatten().find(|size| size.ws_row > 0 && size.ws_col > 0)?;
    Some((size.ws_row, size.ws_col))
}

/// The size for a command's terminal.
pub fn size_or_classic() -> (u16, u16) {
    size().unwrap_or(CLASSIC)
}

/// How wide tables may be; `None` if they are not for a terminal.
pub fn width_of_stdout() -> Option<usize> {
    let size = io::stdout().is_terminal().then(|| tcgetwinsize(io::stdout()).ok()).flatten()?;
    (size.ws_col > 0).then_some(size.ws_col.into())
}

/// A terminal in raw mode: no echo, no lines, no signals from keys. Dropping it brings the mode back
/// that was there, when a panic unwinds too.
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Takes the terminal.
    pub fn enter(terminal: impl AsFd) -> io::Result<Self> {
        // A descriptor of its own: it is there for the way back whatever becomes of the one that was given.
        let terminal = rustix::io::dup(terminal)?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // At once: waiting for output to be read could be for ever. A terminal that is gone needs nothing.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, openpt};
    use rustix::termios::LocalModes;

    #[test]
    fn a_terminal_comes_back_from_a_panic() {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let modes = || tcgetattr(&terminal).unwrap().local_modes;
        let before = modes();
        assert!(before.contains(LocalModes::ICANON | LocalModes::ISIG));
        let panicked = std::panic::catch_unwind(|| {
            let _raw = RawMode::enter(&terminal).unwrap();
            assert!(modes().contains(LocalModes::ICANON), "this one is meant to fail");
        });
        assert!(panicked.is_err(), "the terminal was not raw");
        assert_eq!(modes(), before);
        // What is no terminal is not taken for one.
        assert!(RawMode::enter(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
