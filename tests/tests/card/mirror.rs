//! The other end of the cable, for tests: it answers ARP, neighbour solicitations and pings for every address, and sends
//! every UDP and TCP packet back with source and destination exchanged. A TCP connection to it is one to oneself
//! (RFC 9293 §3.5, simultaneous open): what is sent comes back. Checksums that are left to be completed stay so, and
//! large frames stay whole, so that both directions use all offloads that are there.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use cubby_vmm::NetBackend;
use cubby_vmm::devices::Slice;
use cubby_vmm::devices::net::{Backend, Frame, Offload, Offloads, Segments, Sent};

/// Frames that wait for the guest at most: fewer than a connection has under way.
const WAITING: usize = 16;

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What went through the mirror.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watched {
    /// The largest frames of each kind.
    pub tcp4: usize,
    pub tcp6: usize,
    pub udp: usize,
    /// What the guest's driver accepted.
    pub accepted: Option<Offloads>,
    /// How often there was no room.
    pub full: u64,
}

pub struct Mirror {
    offloads: Offloads,
    waiting: VecDeque<(Offload, Vec<u8>)>,
    watched: Arc<Mutex<Watched>>,
}

impl Mirror {
    pub fn new(offloads: Offloads) -> (Box<Self>, Arc<Mutex<Watched>>) {
        let watched = Arc::new(Mutex::new(Watched::default()));
        (Box::new(Self { offloads, waiting: VecDeque::new(), watched: watched.clone() }), watched)
    }
}

impl NetBackend for Mirror {}

impl Backend for Mirror {
    fn takes(&self) -> Offloads {
        self.offloads
    }

    fn gives(&self) -> Offloads {
        self.offloads
    }

    fn negotiated(&mut self, accepted: Offloads) {
        self.watched.lock().unwrap().accepted = Some(accepted);
    }

    fn transmit(&mut self, frame: Frame<'_>) -> Sent {
        let mut watched = self.watched.lock().unwrap();
        if self.waiting.len() == WAITING {
            watched.full += 1;
            return Sent::Full;
        }
        let mut bytes = vec![0; frame.len];
        assert_eq!(frame.copy_to(&mut bytes), frame.len);
        if let Some(cut) = frame.offload.segmentation {
            let largest = match cut.segments {
                Segments::Tcp4 => &mut watched.tcp4,
                Segments::Tcp6 => &mut watched.tcp6,
                Segments::Udp => &mut watched.udp,
            };
            *largest = frame.len.max(*largest);
        }
        if reflect(&mut bytes).is_some() {
            self.waiting.push_back((frame.offload, bytes));
        }
        Sent::Taken
    }

    fn pending(&mut self) -> Option<usize> {
        self.waiting.front().map(|(_, bytes)| bytes.len())
    }

    fn receive(&mut self, to: &[Slice<'_>]) -> Option<(usize, Offload)> {
        let (offload, bytes) = self.waiting.pop_front()?;
        let mut rest = bytes.as_slice();
        for slice in to {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
        Some((bytes.len(), offload))
    }

    fn discard(&mut self) {
        self.waiting.pop_front();
    }
}

/// Turns a frame into its answer; `None` where there is none.
fn reflect(frame: &mut [u8]) -> Option<()> {
    frame.copy_within(6..12, 0);
    frame[6..12].copy_from_slice(&MAC);
    match [frame[12], frame[13]] {
        [8, 6] => arp(frame.get_mut(14..42)?),
        [8, 0] => {
            let (header, payload) = frame.get_mut(14..)?.split_at_mut_checked(20)?;
            exchange(header, 12, 4);
            transport(header[9], payload, &[])
        }
        [0x86, 0xdd] => {
            let (header, payload) = frame.get_mut(14..)?.split_at_mut_checked(40)?;
            if header[6] == 58 && payload[0] == 135 {
                return solicited(header, payload);
            }
            // Groups are nobody.
            if header[24] == 0xff {
                return None;
            }
            exchange(header, 8, 16);
            transport(header[6], payload, &header[8..40])
        }
        _ => None,
    }
}

/// A request for anybody's address but the guest's own, which it would ask for to learn whether it is taken.
fn arp(packet: &mut [u8]) -> Option<()> {
    if packet[7] != 1 || packet[14..18] == packet[24..28] {
        return None;
    }
    packet[7] = 2;
    exchange(packet, 8, 10);
    packet[8..14].copy_from_slice(&MAC);
    Some(())
}

/// A neighbour solicitation becomes an advertisement (RFC 4861 §4.3, §4.4).
fn solicited(header: &mut [u8], packet: &mut [u8]) -> Option<()> {
    let target: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
    header.copy_within(8..24, 24);
    header[8..24].copy_from_slice(&target);
    packet[0] = 136;
    // Solicited, and to be believed.
    packet[4] = 0x60;
    let option = packet.get_mut(24..32)?;
    option[..2].copy_from_slice(&[2, 1]);
    option[2..].copy_from_slice(&MAC);
    checksum(packet, 2, &header[8..40]);
    Some(())
}

fn transport(protocol: u8, payload: &mut [u8], addresses: &[u8]) -> Option<()> {
    match protocol {
        // Ports lie at the same place in both; the sum over them is that of the exchanged ones.
        6 | 17 => exchange(payload, 0, 2),
        1 if payload[0] == 8 => {
            payload[0] = 0;
            checksum(payload, 2, addresses);
        }
        58 if payload[0] == 128 => {
            payload[0] = 129;
            checksum(payload, 2, addresses);
        }
        _ => return None,
    }
    Some(())
}

/// Exchanges two fields of `len` bytes that follow each other.
fn exchange(bytes: &mut [u8], at: usize, len: usize) {
    let (a, b) = bytes[at..at + 2 * len].split_at_mut(len);
    a.swap_with_slice(b);
}

/// The Internet checksum of an ICMP packet; over the pseudo-header, too, if there are addresses.
fn checksum(packet: &mut [u8], at: usize, addresses: &[u8]) {
    packet[at..at + 2].fill(0);
    let words = |bytes: &[u8]| -> u64 {
        bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum()
    };
    let mut sum = words(packet);
    if !addresses.is_empty() {
        sum += words(addresses) + packet.len() as u64 + 58;
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).unwrap();
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}
