//! What went wrong, for a person in a hurry: one line that says what was asked, what stood in the way and what to do,
//! and the exit code that goes with it.

use std::error::Error as _;
use std::fmt::Write;
use std::io::IsTerminal;

use cubbyhole::{Error, ExecErrorKind};

use crate::output;

/// A failure of our own, where other codes are the command's.
pub const OWN: u8 = 125;

/// The exit code of a time-out, as timeout(1) has it.
const TIMED_OUT: u8 = 124;

/// Why the program ends without having done what was asked.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// What to say; nothing if there is nobody to hear it or all was said.
    message: Option<String>,
    code: u8,
}

impl Failure {
    /// A failure to do what any command but a sandbox's own asked for.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: Some(message.into()), code: 1 }
    }

    /// A failure of `run`, `exec` or `shell` that is not the command's.
    pub fn own(message: impl Into<String>) -> Self {
        Self { message: Some(message.into()), code: OWN }
    }

    /// What ends `run`, `exec` and `shell`.
    pub fn of_command(error: &Error) -> Self {
        Self { message: Some(explain(error)), code: code(error) }
    }

    /// Nobody reads our output any more: the end that SIGPIPE brings to others.
    pub fn unread() -> Self {
        Self { message: None, code: 128 + 13 }
    }

    /// Says it, and gives the exit code.
    pub fn report(&self) -> u8 {
        if let Some(message) = &self.message {
            complain(message);
        }
        self.code
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(explain(&error))
    }
}

/// Says an error that is not the end.
pub fn complain(message: &str) {
    let colour = output::colour(std::io::stderr().is_terminal());
    let head = output::paint("error:", output::Colour::Red, colour);
    // With standard error gone, there is nobody to tell.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{head} {message}\n").as_bytes());
}

/// Says something that is no error.
pub fn say(message: &str) {
    // With standard error gone, there is nobody to tell.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{message}\n").as_bytes());
}

fn code(error: &Error) -> u8 {
    match error {
        Error::ExecFailed { kind: ExecErrorKind::NotFound, .. } => 127,
        Error::ExecFailed { kind: ExecErrorKind::NotExecutable | ExecErrorKind::BadFormat, .. } => 126,
        Error::ExecFailed { kind: ExecErrorKind::KilledForMemory, .. } => 128 + 9,
        Error::Timeout { .. } => TIMED_OUT,
        _ => OWN,
    }
}

/// An error of the SDK in the words of this program, with what caused it.
pub fn explain(error: &Error) -> String {
    let mut text = match error {
        Error::NotFound { name } => {
            format!("there is no sandbox named {name:?}: cubby ls shows those there are")
        }
        Error::AlreadyExists { name } => format!(
            "a sandbox named {name:?} exists: use another name, boot it with cubby start {name}, or remove it with cubby rm -f {name}"
        ),
        Error::InvalidState { name, state, operation } => {
            let operation = if operation == "exec" { "run a command in" } else { operation };
            let remedy = match (state.as_str(), operation) {
                (_, "remove") => format!(": stop it first, or use cubby rm -f {name}"),
                ("Stopped" | "Crashed", "stop" | "kill" | "drain" | "start") => String::new(),
                ("Stopped" | "Crashed", _) => format!(": boot it with cubby start {name}"),
                ("Paused", _) => format!(": let it go on with cubby resume {name}"),
                _ => String::new(),
            };
            format!("cannot {operation} sandbox {name:?}: it is {}{remedy}", state.to_lowercase())
        }
        Error::Ended { name, operation, report, .. } => {
            let after = format!("cubby inspect {name} tells more");
            format!("sandbox {name:?} ended during {operation}: {}; {after}", report.reason)
        }
        Error::InvalidConfig(mistakes) => {
            mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        }
        Error::NoSuchSession { name, session } => {
            format!("sandbox {name:?} has no session {session}: cubby sessions {name} shows those there are")
        }
        Error::NotDetached { name, session } => format!(
            "session {session} of sandbox {name:?} is in the hands of who started it: its terminal can be left with ctrl-p ctrl-q"
        ),
        Error::NoNetwork { name, operation } => format!(
            "cannot {operation} sandbox {name:?}: it was booted without a network: cubby stop {name}, then set another one, and cubby start {name}"
        ),
        Error::Process { name, why } if name.is_empty() => why.clone(),
        Error::HostUnsupported { .. } => format!("{error}; cubby doctor checks the rest"),
        Error::Timeout { what } => format!("{what:?} took longer than its time-out and was ended"),
        error => crate::images::explained(error).unwrap_or_else(|| error.to_string()),
    };
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    if let Error::BootFailed { console_tail: Some(console), .. } = error {
        let lines: Vec<&str> = console.trim_end().lines().collect();
        let last = lines.get(lines.len().saturating_sub(12)..).unwrap_or_default();
        let _ = write!(text, "\nthe guest's last words:\n  {}", last.join("\n  "));
    }
    clean(&text)
}

/// The text without what could make a terminal do something: a guest may have written parts of it.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec_failed(kind: ExecErrorKind) -> Error {
        Error::ExecFailed { program: "x".into(), kind, errno: 0, subject: String::new() }
    }

    #[test]
    fn codes_are_those_of_docker() {
        for (error, expected) in [
            (exec_failed(ExecErrorKind::NotFound), 127),
            (exec_failed(ExecErrorKind::NotExecutable), 126),
            (exec_failed(ExecErrorKind::BadFormat), 126),
            (exec_failed(ExecErrorKind::KilledForMemory), 137),
            (exec_failed(ExecErrorKind::UnknownUser), 125),
            (Error::NotFound { name: "x".into() }, 125),
            (Error::Timeout { what: "x".into() }, 124),
        ] {
            assert_eq!(code(&error), expected, "{error}");
        }
    }

    #[test]
    fn errors_speak_of_commands_and_not_of_functions() {
        let state = |state: &str, operation: &str| {
            let state =
                Error::InvalidState { name: "box".into(), state: state.into(), operation: operation.into() };
            explain(&state)
        };
        assert_eq!(
            state("Stopped", "exec"),
            "cannot run a command in sandbox \"box\": it is stopped: boot it with cubby start box"
        );
        assert_eq!(
            state("Running", "remove"),
            "cannot remove sandbox \"box\": it is running: stop it first, or use cubby rm -f box"
        );
        for error in [Error::NotFound { name: "box".into() }, Error::AlreadyExists { name: "box".into() }] {
            let text = explain(&error);
            assert!(text.contains("cubby ") && !text.contains("::"), "{text}");
        }
    }

    #[test]
    fn causes_are_told_and_terminals_are_safe() {
        let source = std::io::Error::other("disk on fire");
        let error = Error::File { path: "/x".into(), source };
        assert_eq!(explain(&error), "cannot use /x: disk on fire");
        let boot = Error::BootFailed {
            name: "box".into(),
            stage: "kernel".into(),
            message: "no".into(),
            console_tail: Some("first\n\u{1b}[2Jlast\n".into()),
        };
        let text = explain(&boot);
        assert!(text.ends_with("\n  first\n  \u{fffd}[2Jlast"), "{text:?}");
    }
}
