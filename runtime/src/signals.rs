//! Signals that mean the sandbox: whoever ends a session, a service or a machine sends them to every process, and
//! a sandbox should not lose what its guest has written. TERM, INT and HUP stop it, USR1 drains it.
//!
//! What an application started, and what a process list shows first, is the keeper: it passes them on.

use std::fs::File;
use std::io::{self, Read};

use rustix::process::Signal;

use crate::sys;

/// All that are taken.
const TAKEN: [Signal; 4] = [Signal::TERM, Signal::INT, Signal::HUP, Signal::USR1];

/// The signals that have come and were not looked at.
pub(crate) struct Signals(File);

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Stop,
    Drain,
}

impl Signals {
    /// Takes the signals from now on, for this thread and those that it makes.
    pub(crate) fn take() -> io::Result<Self> {
        sys::signal_descriptor(&TAKEN).map(Self)
    }

    /// What becomes readable when a signal comes.
    pub(crate) fn descriptor(&self) -> &File {
        &self.0
    }

    /// The next one that has come.
    pub(crate) fn next(&self) -> Option<Signal> {
        // struct signalfd_siginfo begins with the number (signalfd(2)).
        let mut info = [0; 128];
        (&self.0).read_exact(&mut info).ok()?;
        let number = i32::from_ne_bytes(*info.first_chunk()?);
        Signal::from_named_raw(number)
    }
}

/// What `signal` asks of a sandbox.
pub(crate) fn wish(signal: Signal) -> Wish {
    if signal == Signal::USR1 { Wish::Drain } else { Wish::Stop }
}
