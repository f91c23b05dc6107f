//! A guest that needs no machine: another TCP/IP (smoltcp's) at the other end of the stack's link.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod wire;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use cubby_network::{Addresses, Config, Frame, NetworkEvent, NetworkPolicy, Offload, Resolvers, Stack};
use rustix::event::{PollFd, PollFlags, poll};
use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

/// How long anything may take. It is waited for events, never for time: only a broken stack takes this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// What happens to frames on the link.
pub type Faults = Box<dyn FnMut(Vec<u8>, &mut VecDeque<Vec<u8>>)>;

#[derive(Default)]
struct Link {
    to_guest: VecDeque<Vec<u8>>,
    to_stack: VecDeque<Vec<u8>>,
    mtu: usize,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Link {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Moment) -> Option<(Received, Sending<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Received(frame), Sending(&mut self.to_stack)))
    }

    fn transmit(&mut self, _: Moment) -> Option<Sending<'_>> {
        Some(Sending(&mut self.to_stack))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities
    }
}

/// A guest with its stack.
pub struct Guest {
    pub stack: Stack,
    pub sockets: SocketSet<'static>,
    /// Frames for the guest that are not its kernel's: what [`Guest::send`] was answered with.
    pub seen: Vec<Vec<u8>>,
    /// Whether frames are kept in `seen` and not given to the guest's kernel.
    pub keep: bool,
    /// What happens to frames each way.
    pub outbound: Faults,
    pub inbound: Faults,
    /// Whether time jumps to the next deadline when nothing happens by itself.
    pub hurry: bool,
    ahead: Duration,
    interface: Interface,
    link: Link,
    start: Instant,
    next_port: u16,
}

pub fn addresses() -> Addresses {
    Addresses::default()
}

pub fn config(policy: NetworkPolicy) -> Config {
    Config { policy, resolvers: Resolvers::Fixed(Vec::new()), ..Config::default() }
}

impl Guest {
    pub fn new(config: Config) -> Self {
        let (addresses, start) = (config.addresses.clone(), Instant::now());
        let mut link = Link { mtu: usize::from(config.mtu), ..Link::default() };
        let mac = HardwareAddress::Ethernet(EthernetAddress(addresses.guest_mac));
        let mut interface =
            Interface::new(smoltcp::iface::Config::new(mac), &mut link, Moment::from_micros(0));
        interface.update_ip_addrs(|ips| {
            ips.push(IpCidr::new(addresses.guest_v4.into(), addresses.prefix_v4)).unwrap();
            ips.push(IpCidr::new(addresses.guest_v6.into(), addresses.prefix_v6)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(addresses.gateway_v4).unwrap();
        interface.routes_mut().add_default_ipv6_route(addresses.gateway_v6).unwrap();
        Guest {
            stack: Stack::new(config, start).unwrap(),
            sockets: SocketSet::new(Vec::new()),
            seen: Vec::new(),
            keep: false,
            outbound: Box::new(|frame, out| out.push_back(frame)),
            inbound: Box::new(|frame, out| out.push_back(frame)),
            hurry: false,
            ahead: Duration::ZERO,
            interface,
            link,
            start,
            next_port: 40_000,
        }
    }

    /// A socket that connects.
    pub fn connect(&mut self, to: SocketAddr) -> SocketHandle {
        let handle = self.socket(64 << 10);
        self.next_port += 1;
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), to, self.next_port).unwrap();
        handle
    }

    /// A socket that listens.
    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let handle = self.socket(64 << 10);
        self.tcp(handle).listen(port).unwrap();
        handle
    }

    fn socket(&mut self, buffer: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Lets everything happen that can happen now. Whether something did.
    pub fn turn(&mut self) -> bool {
        let (now, moment) = self.now();
        self.interface.poll(moment, &mut self.link, &mut self.sockets);
        let mut moved = false;
        let mut out = VecDeque::new();
        while self.stack.takes_frames(now)
            && let Some(frame) = self.link.to_stack.pop_front()
        {
            (self.outbound)(frame, &mut out);
            for frame in out.drain(..) {
                self.stack.transmit(&frame, &Offload::default(), now);
                moved = true;
            }
        }
        self.stack.on_ready(now).unwrap();
        self.stack.on_time(now);
        // As many as the guest has buffers for.
        for _ in 0..64 {
            let Some(frame) = self.stack.receive(now) else { break };
            assert_eq!(frame.offload, Offload::default(), "this guest cannot do that");
            let frame = frame.to_vec();
            moved = true;
            if self.keep {
                self.seen.push(frame);
            } else {
                (self.inbound)(frame, &mut self.link.to_guest);
            }
        }
        moved
    }

    /// Goes on until something is so.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let moved = self.turn();
            if is_so(self) {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: {:?}", self.stack);
            if !moved {
                self.wait();
            }
        }
    }

    /// Waits for the host's sockets or for a time that somebody has set; for others' threads, a millisecond.
    fn wait(&mut self) {
        let (now, moment) = self.now();
        let guest = self.interface.poll_delay(moment, &self.sockets).map(Duration::from);
        let stack = self.stack.next_deadline().map(|at| at.saturating_duration_since(now));
        let next = [guest, stack].into_iter().flatten().min();
        let least = next.unwrap_or(PATIENCE).min(Duration::from_millis(1));
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: least.as_nanos().try_into().unwrap() };
        let mut fds = [PollFd::from_borrowed_fd(self.stack.descriptor().unwrap(), PollFlags::IN)];
        let ready = poll(&mut fds, Some(&timeout)).unwrap();
        if let Some(next) = next.filter(|_| self.hurry && ready == 0) {
            self.ahead += next;
        }
    }

    /// What time it is for the guest and its stack.
    pub fn time(&self) -> Instant {
        self.now().0
    }

    fn now(&self) -> (Instant, Moment) {
        let now = Instant::now() + self.ahead;
        (now, Moment::from_micros(i64::try_from((now - self.start).as_micros()).unwrap()))
    }

    /// Sends a frame that no kernel made, and takes what the stack has at once.
    pub fn send(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        let now = Instant::now();
        self.stack.transmit(frame, &Offload::default(), now);
        self.frames()
    }

    /// Frames that wait.
    pub fn frames(&mut self) -> Vec<Vec<u8>> {
        let now = Instant::now();
        self.stack.on_ready(now).unwrap();
        std::iter::from_fn(|| self.stack.receive(now).as_ref().map(Frame::to_vec)).collect()
    }

    pub fn events(&mut self) -> Vec<NetworkEvent> {
        std::iter::from_fn(|| self.stack.next_event()).collect()
    }

    /// Sends all bytes and then ends, while reading everything until the other side ends.
    pub fn exchange(&mut self, handle: SocketHandle, bytes: &[u8]) -> Vec<u8> {
        let (mut sent, mut closed, mut heard) = (0, false, Vec::new());
        self.until("bytes are exchanged", |guest| {
            let socket = guest.tcp(handle);
            if socket.can_send() && sent < bytes.len() {
                sent += socket.send_slice(&bytes[sent..]).unwrap();
            }
            if sent == bytes.len() && !closed && socket.may_send() {
                socket.close();
                closed = true;
            }
            if socket.can_recv() {
                socket
                    .recv(|data| {
                        heard.extend_from_slice(data);
                        (data.len(), ())
                    })
                    .unwrap();
            }
            closed && !socket.may_recv() && !socket.can_recv() && !socket.is_active_state()
        });
        heard
    }
}

/// Whether there is anything left to do for a socket.
pub trait Active {
    fn is_active_state(&self) -> bool;
}

impl Active for tcp::Socket<'static> {
    fn is_active_state(&self) -> bool {
        !matches!(self.state(), tcp::State::Closed | tcp::State::TimeWait)
    }
}

/// Bytes that are told apart by where they are.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i ^ (i >> 8) ^ (i >> 16)) & 0xff).unwrap()).collect()
}

/// What leads to the host's loopback.
pub fn host(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(addresses().host_v4), port)
}

pub fn host6(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(addresses().host_v6), port)
}
