//! What the sandbox process tells of a guest's network: what happened, one by one, and how much of everything. All of it is
//! the host's own observation; names alone are the guest's or its resolver's words.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The most bytes of a policy in [`super::Request::SetNetwork`].
pub const MAX_POLICY: usize = 768 << 10;

/// Payload of [`crate::Kind::NetworkEvent`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkEvent {
    /// How many were lost before this one, because this subscriber, or everybody, was too slow.
    pub lost: u64,
    /// When it was: nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// What it was.
    pub what: NetworkEventKind,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkEventKind {
    /// A connection is open, or the first packet of a flow has passed.
    Connected(NetworkFlow),
    /// A flow was refused, or ended because rules that came later deny it.
    Denied(NetworkFlow, DeniedBy),
    /// A name was not looked up.
    NameDenied(String, DeniedBy),
    /// An answer was kept from the guest, which may not talk to what it names.
    AnswerDropped(String, IpAddr),
}

/// Who talks to whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkFlow {
    /// What is carried.
    pub protocol: FlowProtocol,
    /// Whether somebody has called the guest.
    pub inbound: bool,
    /// The other side, on the host's network.
    pub peer: SocketAddr,
    /// A name that has led to it.
    pub name: Option<String>,
}

/// What is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FlowProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests of ICMP and ICMPv6.
    Icmp,
}

/// What has refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeniedBy {
    /// The index of the policy's rule; without one its base, or a limit.
    pub rule: Option<u32>,
    /// The same in words.
    pub why: String,
}

/// Answers [`super::Request::NetworkCounters`]: since the sandbox process began, by its own count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkCounters {
    /// Frames from the guest. One that is to be cut counts as one.
    pub sent_frames: u64,
    /// Their bytes, from the Ethernet header on.
    pub sent_bytes: u64,
    /// Frames to the guest.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// The guest's frames that were dropped because of what they are.
    pub dropped: DroppedFrames,
    /// TCP connections that have been opened.
    pub tcp_opened: u64,
    /// TCP connections that are held now.
    pub tcp_open: u64,
    /// TCP connections that the other side, or the host, refused or could not reach.
    pub tcp_failed: u64,
    /// Flows of UDP and echo requests that have been opened.
    pub udp_opened: u64,
    /// Flows of UDP and echo requests that are held now.
    pub udp_open: u64,
    /// Datagrams that went nowhere: larger than the link or the socket takes, or the socket was full.
    pub udp_dropped: u64,
    /// Names that the guest has asked for.
    pub lookups: u64,
    /// Flows and names that the policy refused.
    pub denied: u64,
    /// Flows and names that a limit refused.
    pub limited: u64,
    /// Small frames to the guest that it did not fetch in time: answers, refusals, datagrams from published ports.
    pub replies_lost: u64,
}

/// The guest's frames that went nowhere, by what was wrong with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedFrames {
    /// The header before them asks for what cannot be, or they are longer than the card takes.
    pub refused: u64,
    /// They break the rules of a layer.
    pub malformed: u64,
    /// Their checksum is wrong.
    pub checksum: u64,
    /// They come from an address, of Ethernet or IP, that is not the guest's.
    pub spoofed: u64,
    /// They are parts of packets.
    pub fragments: u64,
    /// They are for others, or of protocols that are not spoken.
    pub ignored: u64,
}
