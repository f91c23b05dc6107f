//! Published ports: sockets of the host that lead into the guest.
//!
//! A connection to one is accepted by the host's kernel before the guest is asked: sockets offer nothing else. The guest is
//! called at once, and if nobody listens there the client's connection is reset, before any byte of it was read or
//! written. To a client that looks like a server that took its connection and broke it off, not like a closed port.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use cubby_network_policy::{Direction, Protocol};
use rustix::io::Errno;

use crate::config::{PublishedPort, Transport};
use crate::events::DeniedBy;
use crate::flows::Flows;
use crate::shared::{Shared, Token};
use crate::tcp::Table;

/// What one socket may bring in one turn.
const BATCH: usize = 64;

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Udp(Arc<UdpSocket>),
}

#[derive(Debug)]
struct Port {
    socket: Socket,
    published: PublishedPort,
    /// Since when there may be more than one turn takes.
    more: Option<Instant>,
}

impl Port {
    fn watch(&self, token: Token, shared: &Shared) -> io::Result<()> {
        match &self.socket {
            Socket::Tcp(listener) => shared.watch(listener, token)?,
            Socket::Udp(socket) => shared.watch(socket, token)?,
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
pub(crate) struct Ports {
    ports: Vec<Port>,
    scratch: Vec<u8>,
    /// Given up to refuse a connection when there is no descriptor left to take it.
    spare: Option<OwnedFd>,
}

impl Ports {
    /// Listens, all or nothing: the error comes with the port that it is about.
    pub(crate) fn listen(wanted: &[PublishedPort], shared: &Shared) -> Result<Self, (SocketAddr, io::Error)> {
        let mut ports = Vec::new();
        for published in wanted {
            let token = Token::Port(ports.len());
            let opened = open(*published).and_then(|port| port.watch(token, shared).map(|()| port));
            ports.push(opened.map_err(|error| (published.host, error))?);
        }
        let udp = ports.iter().any(|port| matches!(port.socket, Socket::Udp(_)));
        Ok(Ports { ports, scratch: vec![0; if udp { 65_536 } else { 0 }], spare: crate::socket::spare() })
    }

    /// Has them waited for by somebody else.
    pub(crate) fn watch(&self, shared: &Shared) -> io::Result<()> {
        (0..).zip(&self.ports).try_for_each(|(index, port)| port.watch(Token::Port(index), shared))
    }

    pub(crate) fn published(&self) -> impl Iterator<Item = PublishedPort> {
        self.ports.iter().map(|port| port.published)
    }

    pub(crate) fn on_ready(&mut self, index: usize, now: Instant) {
        if let Some(port) = self.ports.get_mut(index) {
            port.more = Some(now);
        }
    }

    /// When [`Ports::take`] is to be called; it has passed, if it is at all.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.ports.iter().filter_map(|port| port.more).min()
    }

    /// Takes what has come, a bounded amount.
    pub(crate) fn take(&mut self, tcp: &mut Table, flows: &mut Flows, shared: &mut Shared, now: Instant) {
        let Ports { ports, scratch, spare } = self;
        for port in ports.iter_mut().filter(|port| port.more.is_some()) {
            let guest = port.published.guest;
            for _ in 0..BATCH {
                let taken = match &port.socket {
                    Socket::Tcp(listener) => {
                        listener.accept().map(|(stream, client)| match stream.set_nonblocking(true) {
                            Ok(()) => tcp.call_guest(stream, canonical(client), guest, shared, now),
                            Err(_) => crate::socket::end_with_reset(&stream),
                        })
                    }
                    Socket::Udp(socket) => socket.recv_from(scratch).map(|(n, client)| {
                        let payload = scratch.get(..n).unwrap_or_default();
                        flows.receive_for_port(socket, client, guest, payload, shared, now);
                    }),
                };
                match taken {
                    Ok(()) => {}
                    // Its peer has gone; or an answer of ours reached nobody. The next one may be there.
                    Err(error)
                        if matches!(
                            error.kind(),
                            ErrorKind::ConnectionAborted | ErrorKind::ConnectionRefused
                        ) => {}
                    // One that cannot be taken is refused, and not left to wait: that takes a descriptor too.
                    Err(error) if is_exhausted(&error) && spare.take().is_some() => {
                        if let Socket::Tcp(listener) = &port.socket
                            && let Ok((stream, client)) = listener.accept()
                        {
                            crate::socket::end_with_reset(&stream);
                            let by = DeniedBy::Connections;
                            shared.deny(Direction::Inbound, Protocol::Tcp, canonical(client), by);
                        }
                        *spare = crate::socket::spare();
                    }
                    Err(_) => {
                        port.more = None;
                        break;
                    }
                }
            }
        }
    }
}

fn is_exhausted(error: &io::Error) -> bool {
    matches!(crate::socket::errno(error), Errno::MFILE | Errno::NFILE)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn open(published: PublishedPort) -> io::Result<Port> {
    let (socket, host) = match published.transport {
        Transport::Tcp => {
            let listener = TcpListener::bind(published.host)?;
            listener.set_nonblocking(true)?;
            let host = listener.local_addr()?;
            (Socket::Tcp(listener), host)
        }
        Transport::Udp => {
            let socket = UdpSocket::bind(published.host)?;
            socket.set_nonblocking(true)?;
            let host = socket.local_addr()?;
            (Socket::Udp(Arc::new(socket)), host)
        }
    };
    Ok(Port { socket, published: PublishedPort { host, ..published }, more: None })
}
