//! The language of a sandbox: the frames that an application, its sandbox process and the guest agent
//! exchange, with their versions and limits. Both ends of every connection link this crate, and it does
//! no I/O, so that one set of golden bytes pins the format for all of them.
//!
//! A connection carries frames. Each is a [`Header`] of twelve little-endian bytes and a payload: a
//! bincode message ([`message`]) or, for bulk data (stdin, stdout, stderr), the raw bytes. The first
//! frame each way is a [`Hello`]. Many sessions share one connection; each direction of each session
//! has a byte window ([`INITIAL_WINDOW`]) that the receiver refills with [`Kind::Credit`], so that one slow
//! reader delays nobody else.
//!
//! ```text
//!  application ── agent.sock ── sandbox process (relay) ── vsock ── agent
//!              Hello            answers Hello,            Hello
//!              Request/Reply    reads headers only        Open … Exited
//! ```
//!
//! What this crate refuses: a frame over [`MAX_FRAME`] bytes, an unknown kind, reserved bits that are set, a
//! message with bytes left over, a peer of another version. Each is a value of [`FrameError`]; nothing panics.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

mod codec;
mod frame;
mod hello;
pub mod message;
mod scanner;

pub use codec::{decode, encode, encode_raw};
pub use frame::{Decoder, Frame, FrameError, Header, Kind, Role, SessionId};
pub use hello::{Hello, VersionMismatch};
pub use scanner::{Part, Scanner};

/// Largest frame in bytes, header included.
pub const MAX_FRAME: usize = 1 << 20;

/// Largest payload in bytes.
pub const MAX_PAYLOAD: usize = MAX_FRAME - Header::SIZE;

/// How much bulk data a well-behaved sender puts into one frame, in bytes.
pub const CHUNK: usize = 64 << 10;

/// Largest frame in bytes that an agent sends, header included. A relay holds a whole one back until all of it is there:
/// its own answers stand between two of them, and a guest may be paused in the middle of one.
pub const MAX_AGENT_FRAME: usize = 260 << 10;

/// Bytes that each side may send on each direction of a new session before it has to wait for credit.
/// Standard output and standard error share one window.
pub const INITIAL_WINDOW: u32 = 512 << 10;

/// Host-side vsock port (CID 2) on which the sandbox process awaits the agent's control connection.
pub const CONTROL_PORT: u32 = 1024;

/// Guest-side vsock port on which the agent accepts client connections once it has said Ready.
pub const AGENT_PORT: u32 = 1025;

/// Vsock ports, of host and guest, that applications cannot have.
pub const RESERVED_PORTS: std::ops::RangeInclusive<u32> = CONTROL_PORT..=1039;

/// x86 I/O port to which the guest writes one [`message::Mark`] byte; every write is a VM exit.
pub const MARK_IO_PORT: u16 = 0x3f0;
