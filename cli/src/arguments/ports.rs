//! Published ports, networks and resolvers on the command line, as docker writes them.

use std::net::{IpAddr, SocketAddr};

use clap::ValueEnum;
use cubbyhole::{NetworkPolicy, Port};

/// Whom a sandbox may talk to, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// Nobody: it has no network card
    None,
    /// Public addresses, and neither this computer nor private networks
    Public,
    /// Everybody whom this computer reaches, and itself
    All,
}

impl From<Network> for NetworkPolicy {
    fn from(network: Network) -> Self {
        match network {
            Network::None => NetworkPolicy::none(),
            Network::Public => NetworkPolicy::public(),
            Network::All => NetworkPolicy::all(),
        }
    }
}

/// `[[IP:]HOST:]GUEST[/tcp|/udp]`. Without a port of this computer, or with an empty one, one that is free is taken; without an
/// address it is on the loopback, which docker does not do: nobody else should get in whom nobody has asked in.
pub fn publish(text: &str) -> Result<Port, String> {
    let (ports, transport) = text.split_once('/').unwrap_or((text, "tcp"));
    let (rest, guest) = ports.rsplit_once(':').unwrap_or(("", ports));
    let (address, host) = rest.rsplit_once(':').map_or((None, rest), |(address, host)| (Some(address), host));
    let number = |port: &str| port.parse::<u16>().map_err(|_| format!("{port:?} is no port: {FORM}"));
    let mut port = Port::new(if host.is_empty() { 0 } else { number(host)? }, number(guest)?);
    if let Some(address) = address {
        let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
        port = port.on(bare.parse::<IpAddr>().map_err(|_| format!("{address:?} is no address: {FORM}"))?);
    }
    match transport {
        "tcp" => Ok(port),
        "udp" => Ok(port.udp()),
        _ => Err(format!("{transport:?} is neither tcp nor udp: {FORM}")),
    }
}

const FORM: &str = "write HOST:GUEST, IP:HOST:GUEST or GUEST, and /udp behind it for UDP";

/// `IP` or `IP:PORT`.
pub fn resolver(text: &str) -> Result<SocketAddr, String> {
    let whole = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53)).or_else(|_| text.parse());
    whole.map_err(|_| "write its address, with :PORT behind it if that is not 53".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_docker_reads_them_but_for_the_address() {
        for (text, expected) in [
            ("8080:80", "127.0.0.1:8080->80/tcp"),
            ("80", "127.0.0.1:0->80/tcp"),
            (":80", "127.0.0.1:0->80/tcp"),
            ("0:80/tcp", "127.0.0.1:0->80/tcp"),
            ("5353:53/udp", "127.0.0.1:5353->53/udp"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080->80/tcp"),
            ("127.0.0.1::80", "127.0.0.1:0->80/tcp"),
            ("[::1]:8080:80/udp", "[::1]:8080->80/udp"),
            (":::8080:80", "[::]:8080->80/tcp"),
        ] {
            assert_eq!(publish(text).unwrap().to_string(), expected, "{text}");
        }
        for wrong in ["", "x", "80:x", "65536:80", "8080:80/sctp", "host:8080:80", "80-81:80", "-1:80"] {
            assert!(publish(wrong).unwrap_err().contains("HOST:GUEST"), "{wrong}");
        }
    }

    #[test]
    fn a_resolvers_port_is_53_unless_it_is_said() {
        for (text, expected) in [
            ("1.1.1.1", "1.1.1.1:53"),
            ("1.1.1.1:5300", "1.1.1.1:5300"),
            ("::1", "[::1]:53"),
            ("[::1]:5", "[::1]:5"),
        ] {
            assert_eq!(resolver(text).unwrap().to_string(), expected);
        }
        assert!(resolver("example.com").is_err());
    }
}
