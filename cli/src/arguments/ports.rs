//! Published ports, networks and resolvers on the command line, as docker writes them.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};

use cubbyhole::{NetworkPolicy, Port};

/// The longest file with rules.
const MAX_FILE: u64 = 1 << 20;

/// Whom a sandbox may talk to: `none`, `public`, `all`, or `@FILE` with a policy as JSON, `@-` for standard input.
pub fn network(text: &str) -> Result<NetworkPolicy, String> {
    match text {
        "none" => Ok(NetworkPolicy::none()),
        "public" => Ok(NetworkPolicy::public()),
        "all" => Ok(NetworkPolicy::all()),
        _ => {
            let file = text.strip_prefix('@').ok_or("it is one of none, public, all, or @FILE with rules")?;
            let read = |from: &mut dyn Read| {
                let mut json = String::new();
                from.take(MAX_FILE).read_to_string(&mut json).map(|_| json)
            };
            let json = match file {
                "-" => read(&mut io::stdin()),
                file => File::open(file).and_then(|mut file| read(&mut file)),
            };
            let json = json.map_err(|error| format!("{file}: {error}"))?;
            serde_json::from_str(&json).map_err(|error| {
                format!("{file} has no rules: {error}; write {{\"base\": \"none\", \"rules\": [{{\"action\": \"allow\", ..}}]}}")
            })
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
    fn a_network_is_a_word_or_a_file_of_rules() {
        assert_eq!(network("public").unwrap(), NetworkPolicy::public());
        let file = std::env::temp_dir().join(format!("cubby-rules-{}", std::process::id()));
        let from_file = |text: &str| {
            std::fs::write(&file, text).unwrap();
            network(&format!("@{}", file.display()))
        };
        let rules =
            r#"{"base": "none", "rules": [{"action": "allow", "name": "*.example.com", "ports": "443"}]}"#;
        let policy = from_file(rules).unwrap();
        assert_eq!(policy.rules()[0].to_string(), "allow *.example.com port 443");
        assert_eq!(from_file("\"all\"").unwrap(), NetworkPolicy::all());
        for wrong in ["", "{", r#"{"rules": [{"action": "allow", "port": 443}]}"#] {
            let error = from_file(wrong).unwrap_err();
            assert!(error.contains("\"base\""), "{error}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(network(&format!("@{}", file.display())).unwrap_err().contains("No such file"));
        assert!(network("host").unwrap_err().contains("none, public, all"));
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
