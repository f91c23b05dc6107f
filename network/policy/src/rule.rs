//! One rule: what it is about, and what happens then.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Cidr, Flow, NamePattern, is_public};

/// What a rule does with what it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It may be.
    Allow,
    /// It is refused at once.
    Deny,
}

/// Who begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// The guest.
    #[default]
    Outbound,
    /// Somebody who uses a published port.
    Inbound,
}

/// What is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests of ICMP and ICMPv6.
    Icmp,
}

/// Ports from the first to the last: `80`, `8000-8999`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ports {
    first: u16,
    last: u16,
}

/// A text that is no range of ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no range of ports: write 443, or 8000-8999")]
pub struct InvalidPorts {
    /// What was given, its first 64 characters at most.
    pub given: String,
}

impl Ports {
    /// Whether the port is among them.
    #[must_use]
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl From<u16> for Ports {
    fn from(port: u16) -> Self {
        Ports { first: port, last: port }
    }
}

impl FromStr for Ports {
    type Err = InvalidPorts;

    fn from_str(text: &str) -> Result<Self, InvalidPorts> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last && first > 0 => Ok(Ports { first, last }),
            _ => Err(InvalidPorts { given: text.chars().take(64).collect() }),
        }
    }
}

impl TryFrom<String> for Ports {
    type Error = InvalidPorts;

    fn try_from(text: String) -> Result<Self, InvalidPorts> {
        text.parse()
    }
}

impl From<Ports> for String {
    fn from(ports: Ports) -> String {
        ports.to_string()
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last != self.first {
            write!(f, "-{}", self.last)?;
        }
        Ok(())
    }
}

/// One rule. What is `None` is not looked at; everything else must match.
///
/// A rule by name is about the addresses that this sandbox's resolver has answered for that name, so that neither a
/// literal address nor another name's gets past it. To allow by name alone allows public addresses only: whoever
/// owns a name could answer with `127.0.0.1`. A name that stands for a private address needs its network too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What happens.
    pub action: Action,
    /// Who begins.
    #[serde(default)]
    pub direction: Direction,
    /// Addresses of the other side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Cidr>,
    /// Names of the other side. Inbound there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<NamePattern>,
    /// What is carried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Ports of whoever is called: the other side's outbound, the guest's inbound. ICMP has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Ports>,
}

impl Rule {
    fn outbound(action: Action) -> Self {
        Rule { action, direction: Direction::Outbound, net: None, name: None, protocol: None, ports: None }
    }

    /// Allows everything outbound; narrow it by setting fields.
    #[must_use]
    pub fn allow() -> Self {
        Self::outbound(Action::Allow)
    }

    /// Denies everything outbound; narrow it by setting fields.
    #[must_use]
    pub fn deny() -> Self {
        Self::outbound(Action::Deny)
    }

    /// The same for addresses of `net` only.
    #[must_use]
    pub fn net(self, net: Cidr) -> Self {
        Rule { net: Some(net), ..self }
    }

    /// The same for names of `pattern` only.
    #[must_use]
    pub fn name(self, pattern: NamePattern) -> Self {
        Rule { name: Some(pattern), ..self }
    }

    /// The same for one protocol only.
    #[must_use]
    pub fn protocol(self, protocol: Protocol) -> Self {
        Rule { protocol: Some(protocol), ..self }
    }

    /// The same for some ports only.
    #[must_use]
    pub fn ports(self, ports: impl Into<Ports>) -> Self {
        Rule { ports: Some(ports.into()), ..self }
    }

    /// The same for those who use published ports.
    #[must_use]
    pub fn inbound(self) -> Self {
        Rule { direction: Direction::Inbound, ..self }
    }

    pub(crate) fn is_about(&self, flow: &Flow<'_>) -> bool {
        self.direction == flow.direction
            && self.protocol.is_none_or(|protocol| protocol == flow.protocol)
            && self.ports.is_none_or(|ports| flow.protocol != Protocol::Icmp && ports.contains(flow.port))
            && self.is_about_host(flow.address, flow.names.iter().copied())
    }

    /// Whether some port of this host is what the rule is about, as far as address and names go.
    pub(crate) fn is_about_host<'a>(
        &self,
        address: IpAddr,
        mut names: impl Iterator<Item = &'a str>,
    ) -> bool {
        self.net.is_none_or(|net| net.contains(address))
            && self.name.as_ref().is_none_or(|pattern| {
                let trusted = self.action == Action::Deny || self.net.is_some() || is_public(address);
                trusted && names.any(|name| pattern.matches(name))
            })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
        })?;
        if self.direction == Direction::Inbound {
            f.write_str(" inbound")?;
        }
        match self.protocol {
            None => {}
            Some(Protocol::Tcp) => f.write_str(" tcp")?,
            Some(Protocol::Udp) => f.write_str(" udp")?,
            Some(Protocol::Icmp) => f.write_str(" icmp")?,
        }
        if let Some(name) = &self.name {
            write!(f, " {name}")?;
        }
        if let Some(net) = &self.net {
            write!(f, " {net}")?;
        }
        if let Some(ports) = &self.ports {
            write!(f, " port {ports}")?;
        }
        Ok(())
    }
}
