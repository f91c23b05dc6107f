//! How fast bytes go from a guest's frames into a socket of the host and back, and how many connections are opened in a
//! second: `cargo bench -p cubby-network`. The guest is a few lines here, so that it is the stack that is measured. Each figure is the
//! median of five; they are of one thread, beside one other that only reads or writes the host's socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_precision_loss)]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use cubby_network::{
    Addresses, Config, GuestOffloads, NetworkPolicy, Offload, PartialChecksum, Resolvers, Stack,
};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpProtocol, IpRepr, TcpControl,
    TcpPacket, TcpRepr, TcpSeqNumber,
};

const BYTES: usize = 1 << 30;
const ROUNDS: usize = 5;
const HEADERS: usize = 14 + 20 + 20;
/// The checksum is left to the stack, as a guest's driver does.
const LEFT: Offload = Offload { checksum: Some(PartialChecksum { start: 34, offset: 16 }), gso: None };

/// A segment with zeros for payload.
fn frame(link: &Addresses, from: u16, port: u16, control: TcpControl, ack: bool, len: usize) -> Vec<u8> {
    let payload = vec![0; len];
    let repr = TcpRepr {
        src_port: from,
        dst_port: port,
        control,
        seq_number: TcpSeqNumber(0),
        ack_number: ack.then_some(TcpSeqNumber(0)),
        window_len: 0xffff,
        window_scale: (control == TcpControl::Syn).then_some(7),
        max_seg_size: (control == TcpControl::Syn).then_some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &payload,
    };
    let (source, target) = (IpAddr::from(link.guest_v4), IpAddr::from(link.host_v4));
    let ip = IpRepr::new(source.into(), target.into(), IpProtocol::Tcp, repr.buffer_len(), 64);
    let mut bytes = vec![0; 14 + 20 + repr.buffer_len()];
    EthernetRepr {
        src_addr: EthernetAddress(link.guest_mac),
        dst_addr: EthernetAddress(link.gateway_mac),
        ethertype: EthernetProtocol::Ipv4,
    }
    .emit(&mut EthernetFrame::new_unchecked(&mut bytes[..]));
    ip.emit(&mut bytes[14..], &ChecksumCapabilities::default());
    let caps = ChecksumCapabilities::ignored();
    repr.emit(&mut TcpPacket::new_unchecked(&mut bytes[34..]), &source.into(), &target.into(), &caps);
    bytes
}

/// A guest with one connection.
struct Guest {
    stack: Stack,
    link: Addresses,
    seq: u32,
    /// What the stack has acknowledged, and what of its bytes has come.
    acked: u32,
    heard: u32,
    /// What the stack takes beyond that.
    window: u32,
}

impl Guest {
    fn new() -> Self {
        let config = Config {
            policy: NetworkPolicy::all(),
            resolvers: Resolvers::Fixed(Vec::new()),
            ..Config::default()
        };
        let link = config.addresses.clone();
        let mut stack = Stack::new(config, Instant::now()).unwrap();
        stack.set_offloads(GuestOffloads { checksum: true, tso4: true, tso6: true });
        Guest { stack, link, seq: 0, acked: 0, heard: 0, window: 0 }
    }

    fn send(&mut self, frame: &mut [u8]) {
        frame[38..42].copy_from_slice(&self.seq.to_be_bytes());
        frame[42..46].copy_from_slice(&self.heard.to_be_bytes());
        self.stack.transmit(frame, &LEFT, Instant::now());
    }

    /// Takes frames; returns the bytes that came.
    fn receive(&mut self) -> usize {
        let now = Instant::now();
        self.stack.on_ready(now).unwrap();
        self.stack.on_time(now);
        let mut heard = 0;
        while let Some(frame) = self.stack.receive(now) {
            let [head, first, second] = frame.pieces();
            let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let payload = first.len() + second.len();
            let syn = u32::from(head[47] & 2 != 0);
            // That of a SYN is not scaled.
            let shift = if syn == 1 { 0 } else { 4 };
            self.window = u32::from(u16::from_be_bytes(head[48..50].try_into().unwrap())) << shift;
            self.acked = number(42);
            self.heard = number(38).wrapping_add(u32::try_from(payload).unwrap()).wrapping_add(syn);
            heard += payload;
        }
        heard
    }

    fn connect(&mut self, from: u16, port: u16) {
        self.heard = 0;
        let mut syn = frame(&self.link, from, port, TcpControl::Syn, false, 0);
        let begin = self.seq;
        self.send(&mut syn);
        self.seq = self.seq.wrapping_add(1);
        while self.acked != begin.wrapping_add(1) {
            self.receive();
        }
        let mut ack = frame(&self.link, from, port, TcpControl::None, true, 0);
        self.send(&mut ack);
    }
}

fn serve(work: impl FnOnce(TcpStream) + Send + 'static) -> (u16, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, thread::spawn(move || work(listener.accept().unwrap().0)))
}

/// From the guest to the host's socket, in segments of this payload.
fn upwards(payload: usize) -> Duration {
    let (port, server) = serve(|mut stream| {
        let (mut buffer, mut heard) = (vec![0; 1 << 20], 0);
        while heard < BYTES {
            heard += stream.read(&mut buffer).unwrap();
        }
    });
    let mut guest = Guest::new();
    guest.connect(1000, port);
    let mut segment = frame(&guest.link, 1000, port, TcpControl::None, true, payload);
    let begin = Instant::now();
    let mut sent = 0;
    while sent < BYTES {
        let len = u32::try_from(payload).unwrap();
        while guest.seq.wrapping_sub(guest.acked) + len <= guest.window && sent < BYTES {
            guest.send(&mut segment);
            guest.seq = guest.seq.wrapping_add(len);
            sent += payload;
        }
        guest.receive();
    }
    while !server.is_finished() {
        guest.receive();
    }
    server.join().unwrap();
    begin.elapsed()
}

/// From the host's socket to the guest.
fn downwards() -> Duration {
    let (port, server) = serve(|mut stream| {
        let chunk = vec![0; 1 << 20];
        for _ in 0..BYTES >> 20 {
            stream.write_all(&chunk).unwrap();
        }
    });
    let mut guest = Guest::new();
    guest.connect(1000, port);
    let mut ack = frame(&guest.link, 1000, port, TcpControl::None, true, 0);
    let begin = Instant::now();
    let mut heard = 0;
    while heard < BYTES {
        let n = guest.receive();
        heard += n;
        if n > 0 {
            guest.send(&mut ack);
        }
    }
    server.join().unwrap();
    begin.elapsed()
}

/// Connections opened and reset, one after another.
fn connections(n: u16) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || (0..n).for_each(|_| drop(listener.accept().unwrap())));
    let mut guest = Guest::new();
    let begin = Instant::now();
    for from in 1..=n {
        guest.connect(from, port);
        let mut reset = frame(&guest.link, from, port, TcpControl::Rst, true, 0);
        guest.send(&mut reset);
    }
    let took = begin.elapsed();
    server.join().unwrap();
    took
}

fn median(mut measure: impl FnMut() -> Duration) -> Duration {
    let mut all = [(); ROUNDS].map(|()| measure());
    all.sort_unstable();
    all[ROUNDS / 2]
}

fn main() {
    let rate = |took: Duration| BYTES as f64 * 8.0 / took.as_secs_f64() / 1e9;
    println!("guest to host, 64 KiB a frame: {:.1} Gbit/s", rate(median(|| upwards(65_495 - HEADERS))));
    println!("guest to host, 1460 bytes a frame: {:.2} Gbit/s", rate(median(|| upwards(1460))));
    println!("host to guest: {:.1} Gbit/s", rate(median(downwards)));
    println!("connections: {:.0} a second", 5000.0 / median(|| connections(5000)).as_secs_f64());
}
