//! A terminal of the tests' own, with a program on it: what it writes as a stream, and as the screen that a person sees.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use cubby_tests::{BOUND, within};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use tokio::process::{Child, Command};

use super::CUBBY;

/// A terminal with a program on it, what the program has written to it, and what is to be seen of that.
pub struct Terminal {
    ours: OwnedFd,
    keys: File,
    shown: String,
    screen: vt100::Parser,
    output: mpsc::Receiver<Vec<u8>>,
    child: Child,
}

impl Terminal {
    /// The `cubby` command on a terminal of this size.
    pub fn cubby(arguments: &[&str], rows: u16, columns: u16) -> Self {
        Self::start(&[&[CUBBY], arguments].concat(), rows, columns)
    }

    /// A program on a terminal of this size.
    pub fn start(program: &[&str], rows: u16, columns: u16) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let path = ptsname(&ours, Vec::new()).unwrap();
        tcsetwinsize(&ours, size(rows, columns)).unwrap();
        let theirs =
            rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, rustix::fs::Mode::empty()).unwrap();
        let stream = || Stdio::from(theirs.try_clone().unwrap());
        let child = Command::new("setsid")
            .arg("--ctty")
            .args(program)
            .env("TERM", "xterm")
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (sender, output) = mpsc::channel();
        let mut from = File::from(ours.try_clone().unwrap());
        // The other end held open: the terminal is there after the command as well.
        std::thread::spawn(move || {
            let _held = theirs;
            let mut bytes = vec![0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let keys = File::from(ours.try_clone().unwrap());
        let screen = vt100::Parser::new(cells(rows), cells(columns), 0);
        Self { ours, keys, shown: String::new(), screen, output, child }
    }

    pub fn type_in(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    pub fn resize(&mut self, rows: u16, columns: u16) {
        self.screen.screen_mut().set_size(cells(rows), cells(columns));
        tcsetwinsize(&self.ours, size(rows, columns)).unwrap();
    }

    /// Takes what is written next, if it comes within the time.
    fn take(&mut self, within: Duration) -> bool {
        match self.output.recv_timeout(within) {
            Ok(bytes) => {
                self.screen.process(&bytes);
                self.shown.push_str(&String::from_utf8_lossy(&bytes));
                true
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
        }
    }

    /// Takes what is written up to and including `text`, if it comes within the time.
    pub fn see(&mut self, text: &str, within: Duration) -> bool {
        let begin = Instant::now();
        loop {
            if let Some(at) = self.shown.find(text) {
                self.shown.drain(..at + text.len());
                return true;
            }
            if !self.take(within.saturating_sub(begin.elapsed())) {
                return false;
            }
        }
    }

    pub fn expect(&mut self, text: &str) {
        assert!(self.see(text, BOUND), "{text:?} was not shown, but {:?}", self.shown);
    }

    /// Waits until the screen is as it should be.
    pub fn watch(&mut self, what: &str, is_right: impl Fn(&vt100::Screen) -> bool) {
        let begin = Instant::now();
        while !is_right(self.screen.screen()) {
            let came = self.take(BOUND.saturating_sub(begin.elapsed()));
            assert!(came, "no {what}, but\n{}", self.screen.screen().contents());
        }
    }

    /// What is written up to the end of the line.
    pub fn line(&mut self) -> String {
        while !self.shown.contains('\n') {
            assert!(self.take(BOUND), "no line, but {:?}", self.shown);
        }
        let end = self.shown.find('\n').unwrap_or_default();
        self.shown.drain(..=end).collect()
    }

    /// Whether the program has not ended.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn modes(&self) -> Termios {
        tcgetattr(&self.ours).unwrap()
    }

    /// The process on the terminal.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits for its end and gives its exit code.
    pub async fn end(mut self) -> Option<i32> {
        within("the end", self.child.wait()).await.unwrap().code()
    }
}

fn cells(count: u16) -> NonZero<u16> {
    NonZero::new(count).unwrap()
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// What of a terminal's modes a program changes.
pub fn flags(modes: &Termios) -> String {
    format!("{:?} {:?} {:?}", modes.input_modes, modes.output_modes, modes.local_modes)
}
