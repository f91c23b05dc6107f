//! One guest's network: Ethernet frames on one side, sockets of the host on the other, in user space. No root, no tap device,
//! no helper program.
//!
//! The guest has a link with one neighbour, its gateway. Every TCP connection that it opens ends here, at a TCP of our
//! own (`tcp`), and goes on as a socket of the host, if the [policy](NetworkPolicy) allows; so does every flow of
//! UDP and, where the host lets users ping, of echo requests. The gateway answers ARP, NDP, pings and names. Ports that are
//! published lead the other way.
//!
//! # How it is driven
//! [`Stack`] belongs to one thread and never blocks. Its owner
//! - gives it what the guest transmits: [`Stack::transmit`], while [`Stack::takes_frames`];
//! - fetches frames when the guest has buffers: [`Stack::receive`], while [`Stack::has_frames`];
//! - watches its one descriptor ([`Stack::descriptor`]) and calls [`Stack::on_ready`] when that is readable; or takes its
//!   sockets into an epoll instance of its own ([`Stack::watch_by`]) and hands on their events ([`Stack::on_event`]);
//! - calls [`Stack::on_time`] when [`Stack::next_deadline`] has passed.
//!
//! After each of these there may be frames, and another deadline. Frames may be bundles of segments of up to 64 KiB
//! with unfinished checksums, both ways ([`Offload`]), which is what makes it fast: one turn of work for 44 packets. While
//! bytes are under way to the guest, few more are neither read for it nor sent, so that bundles stay large; and each
//! connection keeps no more than its share of the memory that is at hand, however large a window its guest promises.
//!
//! # What it promises
//! - What the guest sends never panics, blocks, or grows the stack beyond [`Limits`].
//! - A connection is not accepted before the other side has: a guest whose `connect` succeeds is connected. Refusals, resets,
//!   half-closes and unreachable hosts come through, each as itself. What the policy denies is refused at once, and
//!   told as an event that names the rule.
//! - Who does not read stops who writes, end to end, in both directions. So does a [`Bandwidth`] that is used up: it
//!   drops nothing.
//! - Frames that do not come from the guest's own addresses go nowhere.
//!
//! # What it refuses
//! IP fragments, IPv6 extension headers, multicast, and every protocol but ARP, ICMP (echo), TCP and UDP. Datagrams larger than
//! the MTU are dropped in both directions. TCP's urgent data is data.
//!
//! # System calls
//! After [`Stack::new`] it makes these and no others, besides memory: `socket`, `connect`, `getsockopt`, `setsockopt`,
//! `shutdown`, `close`, `accept4`, `ioctl` (FIONBIO, for accepted connections), `read`, `readv`, `recvfrom`, `sendto`,
//! `epoll_ctl`, `epoll_wait`; for [`Resolvers::File`] also `statx`, `openat`, `lseek`, `fstat` of that file. `new` itself
//! calls `epoll_create1`, `getrandom`, `bind`, `listen` and `getsockname` too. The clock is its owner's.
#![forbid(unsafe_code)]

mod bandwidth;
mod config;
mod dns;
mod emit;
mod events;
mod flows;
mod frame;
mod names;
mod parse;
mod pcap;
mod ports;
mod ring;
mod shared;
mod slab;
mod socket;
mod stack;
mod tcp;

pub use bandwidth::Bandwidth;
pub use config::{Addresses, Config, Limits, PublishedPort, Resolvers, Transport};
pub use cubby_network_policy::{self as policy, NetworkPolicy};
pub use dns::HOST_NAME;
pub use events::{Counters, DeniedBy, NetworkEvent};
pub use frame::{Frame, Gso, GsoKind, GuestOffloads, Offload, PartialChecksum};
pub use pcap::Pcap;
pub use stack::{Stack, StackError};
