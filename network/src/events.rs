//! What the owner can learn: what happened one by one, and how much of everything.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use cubby_network_policy::{By, Direction, Protocol};
use serde::Serialize;

/// The most events that wait to be fetched; the oldest go first.
const WAITING: usize = 1024;

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkEvent {
    /// A connection is open; for UDP and ICMP: the first packet of a flow has passed.
    Connected {
        /// What is carried.
        protocol: Protocol,
        /// Who has begun.
        direction: Direction,
        /// The other side, on the host's network.
        peer: SocketAddr,
        /// A name that has led to it.
        name: Option<String>,
    },
    /// The first packet of a flow was refused.
    Denied {
        /// What was carried.
        protocol: Protocol,
        /// Who has begun.
        direction: Direction,
        /// The other side, on the host's network.
        peer: SocketAddr,
        /// A name that has led to it.
        name: Option<String>,
        /// What refuses it.
        by: DeniedBy,
    },
    /// A name was not looked up.
    NameDenied {
        /// The name.
        name: String,
        /// What refuses it.
        by: DeniedBy,
    },
    /// An answer was kept from the guest, because the guest may not talk to what it names.
    AnswerDropped {
        /// The name that was asked for.
        name: String,
        /// The address that was answered.
        address: IpAddr,
    },
}

/// What refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeniedBy {
    /// The policy: [`NetworkPolicy::explain`](cubby_network_policy::NetworkPolicy::explain) has words for it.
    Policy(By),
    /// [`Limits::tcp_connections`](crate::Limits::tcp_connections), or the process has no descriptor left.
    Connections,
    /// [`Limits::half_open`](crate::Limits::half_open).
    HalfOpen,
    /// [`Limits::new_flows_per_second`](crate::Limits::new_flows_per_second).
    Rate,
    /// [`Limits::lookups`](crate::Limits::lookups).
    Lookups,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// How much of everything, since the stack was made.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }
    };
}

counters! {
    /// Frames from the guest.
    frames_in,
    /// Their bytes.
    bytes_in,
    /// Frames to the guest.
    frames_out,
    /// Their bytes.
    bytes_out,
    /// Frames that break the rules of a layer.
    malformed,
    /// Frames with a wrong checksum.
    bad_checksum,
    /// Frames from addresses that are not the guest's.
    spoofed,
    /// Frames with a part of a packet.
    fragments,
    /// Frames for others, or of protocols that are not spoken here.
    ignored,
    /// TCP connections that have been opened.
    tcp_opened,
    /// TCP connections that are held now.
    tcp_connections,
    /// TCP connections that the other side, or the host, refused or could not reach.
    tcp_failed,
    /// UDP flows that have been opened.
    udp_opened,
    /// UDP flows and echo flows that are held now.
    udp_flows,
    /// Datagrams that went nowhere: larger than the link or the socket takes, or the socket was full.
    udp_dropped,
    /// Names that the guest has asked for.
    lookups,
    /// Of these, answered from memory.
    lookups_cached,
    /// Flows and names that the policy refused.
    denied,
    /// Flows and names that a limit refused.
    limited,
    /// Replies that the guest did not fetch in time.
    replies_lost,
    /// Events that nobody fetched.
    events_lost,
    /// Bytes that buffers hold now.
    buffered,
}

/// Events that wait.
#[derive(Debug, Default)]
pub(crate) struct Events {
    waiting: VecDeque<NetworkEvent>,
}

impl Events {
    pub(crate) fn push(&mut self, event: NetworkEvent, counters: &mut Counters) {
        if self.waiting.len() >= WAITING {
            self.waiting.pop_front();
            counters.events_lost += 1;
        }
        self.waiting.push_back(event);
    }

    pub(crate) fn pop(&mut self) -> Option<NetworkEvent> {
        self.waiting.pop_front()
    }
}
