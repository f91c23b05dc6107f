//! Events: lines of JSON between the application and the processes of the guest, `{"event":"name","data":...}`.
//!
//! The host's go to every process that listens at [`EVENT_SOCKET`]; those of the processes to every subscription that
//! wants their name. What a subscription may have under way is bounded by its session's window, in bytes of
//! [`Event`]s; what waits in the agent beyond that is bounded too, and what does not fit there is counted.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// Where guest processes find the agent: a stream socket, open to every user of the guest.
pub const EVENT_SOCKET: &str = "/run/agent.sock";

/// Longest event in bytes: the line without its newline.
pub const MAX_EVENT: usize = 256 << 10;

/// Longest name of an event in bytes. An empty one is none.
pub const MAX_EVENT_NAME: usize = 256;

/// How deep an event's arrays and objects may lie in each other, the outermost included.
pub const MAX_EVENT_DEPTH: usize = 64;

/// Payload of [`crate::Kind::Subscribe`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscribe {
    /// The name of the events that are wanted; without one, all are.
    pub name: Option<String>,
}

/// Payload of [`crate::Kind::Event`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event<'a> {
    /// How many events the subscription has lost right before this one.
    pub dropped: u64,
    /// The line as the process wrote it; empty where only losses are told.
    pub line: Cow<'a, str>,
}

impl Event<'_> {
    /// The most bytes that `line` takes as a payload.
    pub fn size_of(line: &str) -> usize {
        /// Two integers of the wire format.
        const INTEGERS: usize = 2 * 9;
        INTEGERS + line.len()
    }
}
