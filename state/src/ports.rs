//! Published ports: addresses of the host that lead into a sandbox.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The most ports of one sandbox: each is a descriptor of its process.
pub const MAX_PORTS: usize = 256;

/// What is carried to a published port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads into the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Port {
    /// The host's address: its loopback unless another one is named, so that nobody else on the network gets in.
    #[serde(default = "loopback")]
    pub address: IpAddr,
    /// On the host; 0 stands for one that is free when the sandbox boots.
    pub host: u16,
    /// In the guest, 1 to 65535.
    pub guest: u16,
    /// What is carried.
    #[serde(default)]
    pub transport: Transport,
}

const fn loopback() -> IpAddr {
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}

impl Port {
    /// A port of the host's `127.0.0.1` that leads to a TCP port of the guest.
    #[must_use]
    pub fn new(host: u16, guest: u16) -> Self {
        Port { address: loopback(), host, guest, transport: Transport::Tcp }
    }

    /// The same on another address of the host: `0.0.0.0` and `::` let everybody in who reaches this host.
    #[must_use]
    pub fn on(self, address: impl Into<IpAddr>) -> Self {
        Port { address: address.into(), ..self }
    }

    /// The same for UDP.
    #[must_use]
    pub fn udp(self) -> Self {
        Port { transport: Transport::Udp, ..self }
    }

    /// Where the host listens.
    #[must_use]
    pub fn listens_on(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.host)
    }

    /// Whether both want the same of the host, which only one can have.
    pub(crate) fn collides(&self, other: &Port) -> bool {
        self.host != 0
            && self.host == other.host
            && self.transport == other.transport
            && self.address == other.address
    }
}

/// As docker writes it: `127.0.0.1:8080->80/tcp`.
impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        write!(f, "{}->{}/{transport}", self.listens_on(), self.guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_one_of_the_loopback_unless_another_address_is_named() {
        let port: Port = serde_json::from_str(r#"{"host":8080,"guest":80}"#).unwrap();
        assert_eq!(port, Port::new(8080, 80));
        assert_eq!(port.to_string(), "127.0.0.1:8080->80/tcp");
        let other = Port::new(0, 53).on([0; 16]).udp();
        assert_eq!(other.to_string(), "[::]:0->53/udp");
        let json = serde_json::to_string(&other).unwrap();
        assert_eq!(json, r#"{"address":"::","host":0,"guest":53,"transport":"udp"}"#);
        assert_eq!(serde_json::from_str::<Port>(&json).unwrap(), other);
    }

    #[test]
    fn only_the_same_port_of_the_same_address_is_taken_twice() {
        let port = Port::new(80, 80);
        assert!(port.collides(&Port::new(80, 81)));
        for other in [port.udp(), port.on([0; 4]), Port::new(81, 80), Port::new(0, 80)] {
            assert!(!port.collides(&other), "{other}");
        }
        assert!(!Port::new(0, 80).collides(&Port::new(0, 80)));
    }
}
