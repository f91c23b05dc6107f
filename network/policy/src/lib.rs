//! Whom a sandbox may talk to: rules as data, and one pure decision over them.
//!
//! This is the part of the network that its configuration is made of: it is stored with a sandbox and written by its
//! user, so that it has no dependency but serde. `cubby-network` asks it; nothing here opens a socket.
//!
//! The first rule that is about a flow decides. If none is, the [`Base`] does. What a rule asks for is
//! in [`Rule`].
//!
//! ```
//! use cubby_network_policy::{Flow, NetworkPolicy, Protocol, Rule};
//!
//! let policy = NetworkPolicy::none().rule(Rule::allow().name("*.example.com".parse()?).ports(443));
//! let address = "93.184.215.14".parse()?;
//! let flow = Flow::outbound(Protocol::Tcp, address, 443).named(&["www.example.com"]);
//! assert!(policy.decide(&flow).is_allowed());
//! // The same address, to which no name that the rule is about has led:
//! assert!(!policy.decide(&Flow::outbound(Protocol::Tcp, address, 443)).is_allowed());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod cidr;
mod name;
mod rule;

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use cidr::{Cidr, InvalidCidr, is_public};
pub use name::{InvalidName, NamePattern};
pub use rule::{Action, Direction, InvalidPorts, Ports, Protocol, Rule};

/// The most rules of a policy: each is looked at for each new connection.
pub const MAX_RULES: usize = 1024;

/// What holds where no rule says anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// Nobody may be talked to, in either direction, and no name is looked up.
    None,
    /// Public addresses ([`is_public`]), and whoever uses a published port.
    #[default]
    Public,
    /// Everybody whom the host can reach, its own loopback included.
    All,
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Base::None => "none",
            Base::Public => "public",
            Base::All => "all",
        })
    }
}

/// Whom a sandbox may talk to. In JSON the base alone (`"public"`), or `{"base": "none", "rules": [..]}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct NetworkPolicy {
    base: Base,
    rules: Vec<Rule>,
}

/// What is written: an unknown field is an error, for it could be the one that narrows a rule.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Base(Base),
    Rules(WithRules),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WithRules {
    #[serde(default)]
    base: Base,
    rules: Vec<Rule>,
}

impl From<Written> for NetworkPolicy {
    fn from(written: Written) -> Self {
        match written {
            Written::Base(base) => NetworkPolicy { base, rules: Vec::new() },
            Written::Rules(WithRules { base, rules }) => NetworkPolicy { base, rules },
        }
    }
}

impl From<NetworkPolicy> for Written {
    fn from(policy: NetworkPolicy) -> Self {
        if policy.rules.is_empty() {
            Written::Base(policy.base)
        } else {
            Written::Rules(WithRules { base: policy.base, rules: policy.rules })
        }
    }
}

impl From<Base> for NetworkPolicy {
    fn from(base: Base) -> Self {
        NetworkPolicy { base, rules: Vec::new() }
    }
}

/// Who wants to talk to whom.
#[derive(Clone, Copy, Debug)]
pub struct Flow<'a> {
    /// Who begins.
    pub direction: Direction,
    /// What is carried.
    pub protocol: Protocol,
    /// The other side.
    pub address: IpAddr,
    /// The port of whoever is called; 0 for ICMP.
    pub port: u16,
    /// Names for which the resolver has answered this address.
    pub names: &'a [&'a str],
}

impl<'a> Flow<'a> {
    /// From the guest.
    #[must_use]
    pub fn outbound(protocol: Protocol, address: IpAddr, port: u16) -> Self {
        Flow { direction: Direction::Outbound, protocol, address, port, names: &[] }
    }

    /// To the guest's `port`.
    #[must_use]
    pub fn inbound(protocol: Protocol, address: IpAddr, port: u16) -> Self {
        Flow { direction: Direction::Inbound, protocol, address, port, names: &[] }
    }

    /// The same, with the names that have led to the address.
    #[must_use]
    pub fn named(self, names: &'a [&'a str]) -> Self {
        Flow { names, ..self }
    }
}

/// What was decided, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It may be.
    Allowed(By),
    /// It is refused.
    Denied(By),
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// The rule with this index.
    Rule(usize),
    /// No rule was about it.
    Base(Base),
}

impl Verdict {
    /// Whether it may be.
    #[must_use]
    pub fn is_allowed(self) -> bool {
        matches!(self, Verdict::Allowed(_))
    }

    fn of(allowed: bool, by: By) -> Self {
        if allowed { Verdict::Allowed(by) } else { Verdict::Denied(by) }
    }
}

impl NetworkPolicy {
    /// Nobody, but for what rules allow.
    #[must_use]
    pub fn none() -> Self {
        Base::None.into()
    }

    /// Public addresses.
    #[must_use]
    pub fn public() -> Self {
        Base::Public.into()
    }

    /// Everybody the host can reach.
    #[must_use]
    pub fn all() -> Self {
        Base::All.into()
    }

    /// The same with one more rule, after those there are.
    #[must_use]
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// What holds where no rule says anything.
    #[must_use]
    pub fn base(&self) -> Base {
        self.base
    }

    /// The rules, in their order. There should be [`MAX_RULES`] at most.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Whether this flow may be, and what says so.
    #[must_use]
    pub fn decide(&self, flow: &Flow<'_>) -> Verdict {
        let flow = Flow { address: flow.address.to_canonical(), ..*flow };
        match self.rules.iter().position(|rule| rule.is_about(&flow)) {
            Some(index) => Verdict::of(self.is_allow(index), By::Rule(index)),
            None => {
                let inbound = flow.direction == Direction::Inbound && self.base != Base::None;
                Verdict::of(inbound || self.base_reaches(flow.address), By::Base(self.base))
            }
        }
    }

    /// Whether the guest may look up this name. Rules for some ports, protocols or networks count if they allow.
    ///
    /// Where the base is [`Base::None`] only names that a rule allows are looked up, for a query is a message too.
    #[must_use]
    pub fn decide_name(&self, name: &str) -> Verdict {
        for (index, rule) in self.rules.iter().enumerate() {
            let about = rule.direction == Direction::Outbound
                && rule.name.as_ref().is_some_and(|pattern| pattern.matches(name));
            match rule.action {
                Action::Allow if about => return Verdict::Allowed(By::Rule(index)),
                Action::Deny if about && is_whole(rule) && rule.net.is_none() => {
                    return Verdict::Denied(By::Rule(index));
                }
                _ => {}
            }
        }
        Verdict::of(self.base != Base::None, By::Base(self.base))
    }

    /// Whether the guest may learn that `name` stands for `address`: whether it could talk to it then, on some port. A
    /// public name that answers with a private address is how a network is attacked from inside (DNS rebinding).
    #[must_use]
    pub fn may_answer(&self, name: &str, address: IpAddr) -> bool {
        let address = address.to_canonical();
        for rule in self.rules.iter().filter(|rule| rule.direction == Direction::Outbound) {
            if rule.is_about_host(address, std::iter::once(name)) {
                match rule.action {
                    Action::Allow => return true,
                    Action::Deny if is_whole(rule) => return false,
                    Action::Deny => {}
                }
            }
        }
        self.base_reaches(address)
    }

    /// A decision in words.
    #[must_use]
    pub fn explain(&self, by: By) -> String {
        match by {
            By::Rule(index) => match self.rules.get(index) {
                Some(rule) => format!("rule {index}: {rule}"),
                None => format!("rule {index}, which has been replaced"),
            },
            By::Base(base) => format!("no rule, and the policy is {base}"),
        }
    }

    fn is_allow(&self, index: usize) -> bool {
        self.rules.get(index).is_some_and(|rule| rule.action == Action::Allow)
    }

    fn base_reaches(&self, address: IpAddr) -> bool {
        match self.base {
            Base::None => false,
            Base::Public => is_public(address),
            Base::All => true,
        }
    }
}

/// Whether a rule is about all that a host offers.
fn is_whole(rule: &Rule) -> bool {
    rule.protocol.is_none() && rule.ports.is_none()
}

#[cfg(test)]
mod tests;
