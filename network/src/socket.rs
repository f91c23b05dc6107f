//! Sockets of the host, as the stack opens them: never blocking, closed by exec.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::emit::Unreachable;

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// What the guest is told when the host could not reach somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nobody listens there.
    Refused,
    /// It cannot be reached.
    Unreachable(Unreachable),
    /// The host has no descriptor, port or memory for it.
    Exhausted,
    /// Nothing has answered; the guest has its own patience.
    Silence,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NETUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT => {
                Failure::Unreachable(Unreachable::Network)
            }
            Errno::HOSTUNREACH | Errno::HOSTDOWN => Failure::Unreachable(Unreachable::Host),
            Errno::PERM | Errno::ACCESS => Failure::Unreachable(Unreachable::Prohibited),
            Errno::MFILE
            | Errno::NFILE
            | Errno::NOBUFS
            | Errno::NOMEM
            | Errno::ADDRNOTAVAIL
            | Errno::AGAIN => Failure::Exhausted,
            Errno::TIMEDOUT => Failure::Silence,
            _ => Failure::Refused,
        }
    }
}

/// Begins to connect. The socket tells by becoming writable how it went.
pub(crate) fn connect_tcp(peer: SocketAddr) -> Result<TcpStream, Errno> {
    let socket = net::socket_with(family(peer.ip()), SocketType::STREAM, FLAGS, None)?;
    tune(&socket);
    match net::connect(&socket, &peer) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(errno) => Err(errno),
    }
}

/// The guest has its own Nagle; and since its probes are answered by us, ours ask whether the peer lives. Both only better
/// what works without.
pub(crate) fn tune(socket: impl AsFd) {
    let _ = sockopt::set_tcp_nodelay(&socket, true);
    let _ = sockopt::set_socket_keepalive(&socket, true);
}

/// Makes the end of this connection a reset.
pub(crate) fn end_with_reset(stream: &TcpStream) {
    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

/// A socket that sends to `peer`, and hears from it alone.
pub(crate) fn connect_udp(peer: SocketAddr) -> Result<UdpSocket, Errno> {
    let socket = net::socket_with(family(peer.ip()), SocketType::DGRAM, FLAGS, None)?;
    net::connect(&socket, &peer)?;
    Ok(UdpSocket::from(socket))
}

/// The same for echo requests, where the host lets this user have one (`net.ipv4.ping_group_range`).
pub(crate) fn connect_ping(peer: IpAddr) -> Result<UdpSocket, Errno> {
    let protocol = if peer.is_ipv4() { ipproto::ICMP } else { ipproto::ICMPV6 };
    let socket = net::socket_with(family(peer), SocketType::DGRAM, FLAGS, Some(protocol))?;
    net::connect(&socket, &SocketAddr::new(peer, 0))?;
    Ok(UdpSocket::from(socket))
}

/// A descriptor that does nothing.
pub(crate) fn spare() -> Option<OwnedFd> {
    net::socket_with(AddressFamily::INET, SocketType::DGRAM, FLAGS, None).ok()
}

/// What an error of std's was.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
