//! The lifecycle as one pure table.
//!
//! [`Status::after`] is the only place that decides what may follow what. It holds no data, does no I/O and
//! never waits, so that the order of races (exec against drain, idle against stop, kill against crash) is the
//! order in which events meet this table, and nothing else. `docs/lifecycle.md` shows the same table to
//! readers; a test compares the two.
//!
//! Promises: a status that has no process ([`Status::Stopped`], [`Status::Crashed`]) is left by `start` and
//! `remove` alone; once a sandbox drains it takes no new session and can only end; every status has a way to
//! an end.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Status {
    /// The machine is being built and booted; the agent has not said that it is ready.
    Creating,
    /// The agent is ready; commands, files and events are served.
    Running,
    /// The guest is frozen; it uses no processor time and continues exactly where it was.
    Paused,
    /// A graceful end is in progress: what is in flight goes on, nothing new is accepted.
    Draining,
    /// The machine has ended as somebody asked; configuration and disk are kept.
    Stopped,
    /// The machine has ended as nobody asked; configuration and disk are kept.
    Crashed,
}

/// What a client asks of a sandbox, or what happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A client opens a session: exec, shell, a file operation, an event to the guest.
    Open,
    /// A client freezes the guest.
    Pause,
    /// A client lets the guest continue.
    Resume,
    /// A client lets the application that created the sandbox end without it.
    Detach,
    /// A client wants no new sessions, and an end once those in flight have finished.
    Drain,
    /// A client wants a graceful end now: TERM, grace, KILL to the guest's processes, sync, power-off. The
    /// end of the application of an attached sandbox asks for the same.
    Stop,
    /// A client wants the process gone at once.
    Kill,
    /// A client wants an ended sandbox to boot again.
    Start,
    /// A client wants an ended sandbox forgotten, disk and all.
    Remove,
    /// The agent said that it is ready.
    Ready,
    /// The boot ended in an error.
    BootFailed,
    /// Nobody has used the sandbox for its idle timeout. The idle clock stands still in every status but
    /// Running.
    IdleExpired,
    /// The sandbox has lived for its maximum duration.
    LifetimeExpired,
    /// The guest powered off as the agent had announced.
    PoweredOff,
    /// The guest or its process ended in any other way.
    Crash,
}

/// What follows a legal event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Next {
    /// The sandbox has this status now; it may be the one it had.
    Status(Status),
    /// The sandbox does not exist any more.
    Gone,
}

/// An event that the table does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox that is {status} does not take {event}")]
pub struct Refused {
    /// The status the sandbox had, and still has.
    pub status: Status,
    /// What was asked or reported.
    pub event: Event,
}

impl Status {
    /// All statuses, in the order of a life.
    pub const ALL: [Status; 6] = [
        Status::Creating,
        Status::Running,
        Status::Paused,
        Status::Draining,
        Status::Stopped,
        Status::Crashed,
    ];

    /// The table: what `event` makes of a sandbox with this status.
    ///
    /// # Errors
    /// [`Refused`] when the event is not legal here; the status is unchanged.
    pub fn after(self, event: Event) -> Result<Next, Refused> {
        use Event as E;
        use Status::{Crashed, Creating, Draining, Paused, Running, Stopped};
        let next = match (self, event) {
            (Running, E::Open) => Running,
            (Running, E::Pause) => Paused,
            (Paused, E::Resume) => Running,
            (Creating | Running | Paused | Draining, E::Detach) => self,

            // A second drain or stop hurries the first: a nearer deadline, a shorter grace.
            (Running | Paused | Draining, E::Drain) => Draining,
            (Creating | Running | Paused | Draining, E::Stop | E::LifetimeExpired) => Draining,
            (Running, E::IdleExpired) => Draining,

            (Creating, E::Ready) => Running,
            // The boot was already on its way when it was stopped: being ready changes nothing any more.
            (Draining, E::Ready) => Draining,
            (Creating | Draining, E::BootFailed) => Crashed,

            // A paused guest does not run, and a booting one has no agent that could announce anything.
            (Running | Draining, E::PoweredOff) => Stopped,
            (Creating | Running | Paused | Draining, E::Kill) => Stopped,
            (Creating | Running | Paused | Draining, E::Crash) => Crashed,

            (Stopped | Crashed, E::Start) => Creating,
            (Stopped | Crashed, E::Remove) => return Ok(Next::Gone),

            (status, event) => return Err(Refused { status, event }),
        };
        Ok(Next::Status(next))
    }

    /// Whether a process stands behind this status.
    #[must_use]
    pub fn is_live(self) -> bool {
        !matches!(self, Status::Stopped | Status::Crashed)
    }

    /// The name, as it is stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Creating => "Creating",
            Status::Running => "Running",
            Status::Paused => "Paused",
            Status::Draining => "Draining",
            Status::Stopped => "Stopped",
            Status::Crashed => "Crashed",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A text that is no [`Status`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the status of a sandbox")]
pub struct UnknownStatus(pub String);

impl FromStr for Status {
    type Err = UnknownStatus;

    fn from_str(text: &str) -> Result<Self, UnknownStatus> {
        Status::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| UnknownStatus(text.chars().take(64).collect()))
    }
}

impl Event {
    /// All events: first what clients ask, then what happens.
    pub const ALL: [Event; 15] = [
        Event::Open,
        Event::Pause,
        Event::Resume,
        Event::Detach,
        Event::Drain,
        Event::Stop,
        Event::Kill,
        Event::Start,
        Event::Remove,
        Event::Ready,
        Event::BootFailed,
        Event::IdleExpired,
        Event::LifetimeExpired,
        Event::PoweredOff,
        Event::Crash,
    ];

    /// The name, as errors and the documentation show it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Event::Open => "open",
            Event::Pause => "pause",
            Event::Resume => "resume",
            Event::Detach => "detach",
            Event::Drain => "drain",
            Event::Stop => "stop",
            Event::Kill => "kill",
            Event::Start => "start",
            Event::Remove => "remove",
            Event::Ready => "ready",
            Event::BootFailed => "boot failed",
            Event::IdleExpired => "idle expired",
            Event::LifetimeExpired => "lifetime expired",
            Event::PoweredOff => "powered off",
            Event::Crash => "crash",
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
