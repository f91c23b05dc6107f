//! A sandbox's network while it runs: other rules, and what happens there, one by one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use cubby_protocol::message::{self, Credit, FlowProtocol, NetworkEventKind as Kinds, Request};
use cubby_protocol::{INITIAL_WINDOW, Kind, decode};
use cubby_state::network::{Direction, MAX_RULES, NetworkPolicy, Protocol};
use cubby_state::{Mistake, Status};

use crate::connection::Session;
use crate::error::{Error, R};
use crate::link::Link;
use crate::sandbox::Sandbox;

/// Something that has happened in a sandbox's network ([`Sandbox::network_events`]).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetworkEvent {
    /// When it was: the host's clock.
    pub at: SystemTime,
    /// What it was.
    pub kind: NetworkEventKind,
}

/// What has happened. It is the host's own observation; of names alone the guest, or its resolver, has the word.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetworkEventKind {
    /// A connection is open; of UDP and ICMP: the first packet of a flow has passed.
    Connected(NetworkFlow),
    /// A connection or flow was refused, or was ended because rules that came later deny it.
    Denied {
        /// Who wanted to talk to whom.
        flow: NetworkFlow,
        /// What has refused it.
        by: DeniedBy,
    },
    /// A name was not looked up.
    NameDenied {
        /// The name.
        name: String,
        /// What has refused it.
        by: DeniedBy,
    },
    /// An answer was kept from the guest, because it may not talk to what the answer names.
    AnswerDropped {
        /// The name that was asked for.
        name: String,
        /// The address that was answered.
        address: IpAddr,
    },
}

/// Who talks to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetworkFlow {
    /// What is carried.
    pub protocol: Protocol,
    /// Whether the guest calls, or is called.
    pub direction: Direction,
    /// The other side, on the host's network. Its port is 0 for ICMP.
    pub peer: SocketAddr,
    /// A name that has led the guest to it.
    pub name: Option<String>,
}

/// What has refused something.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeniedBy {
    /// The place of the rule in [`NetworkPolicy::rules`]; `None` if it was what the policy begins with, or a limit.
    pub rule: Option<usize>,
    /// The same in words.
    pub why: String,
}

const SET: &str = "change the network of";
const WATCH: &str = "watch the network of";

impl Sandbox {
    /// Puts another policy in force, now and for later runs. When this returns, all flows are judged by it: connections that
    /// it does not allow have been reset on both sides and other flows ended, each with a [`NetworkEventKind::Denied`];
    /// what it allows goes on. A sandbox that drains takes new rules too, and one that is paused is judged by them when it
    /// goes on. What has ended has them at its next start.
    ///
    /// A sandbox that runs keeps its card under [`NetworkPolicy::none`], with nobody to talk to; from its next start on it has
    /// none, and publishes nothing.
    ///
    /// # Errors
    /// [`Error::NoNetwork`] if it runs and was booted without a network, and [`Error::InvalidConfig`] for more than
    /// [`MAX_RULES`] rules. Then nothing has changed.
    ///
    /// ```no_run
    /// # async fn example(sandbox: cubbyhole::Sandbox) -> Result<(), Box<dyn std::error::Error>> {
    /// use cubbyhole::network::{NetworkPolicy, Rule};
    ///
    /// let policy = NetworkPolicy::none().rule(Rule::allow().name("pypi.org".parse()?).ports(443));
    /// sandbox.set_network_policy(policy).await?;
    /// # Ok(()) }
    /// ```
    pub async fn set_network_policy(&self, policy: NetworkPolicy) -> R<()> {
        let rules = policy.rules().len();
        let json = serde_json::to_string(&policy)
            .map_err(|error| Error::Process { name: self.name().into(), why: error.to_string() })?;
        if rules > MAX_RULES || json.len() > message::MAX_POLICY {
            let given = format!("{rules} rules of {} bytes", json.len());
            let allowed = "of 1024 rules and 768 KiB of JSON at most";
            return Err(Error::InvalidConfig(vec![Mistake { field: "network", given, allowed }]));
        }
        // It may end, or be started, between two looks at it.
        for _ in 0..TRIES {
            let store = &self.link.context.store;
            let ended = store.set_network_of_ended(&self.link.id, &policy);
            if ended.map_err(|error| Error::store(self.name(), error))? {
                return Ok(());
            }
            match self.link.ask(Request::SetNetwork { policy: json.clone() }, SET).await {
                Ok(_) => return Ok(()),
                Err(Error::InvalidState { .. } | Error::Ended { .. }) if !self.link.is_live()? => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::invalid_state(self.name(), Status::Creating, SET))
    }

    /// What happens in its network from now on: connections that open, and what is refused, with the rule that has refused it.
    /// Any number of programs may listen, each with 16 streams at most; one that is too slow loses events, which
    /// [`NetworkEventStream::dropped`] counts, and delays nobody.
    ///
    /// To listen is no use of the sandbox: it holds neither the idle time-out nor a drain.
    ///
    /// # Errors
    /// [`Error::NoNetwork`] for a sandbox that was booted without one.
    pub async fn network_events(&self) -> R<NetworkEventStream> {
        NetworkEventStream::open(&self.link).await
    }
}

/// How often a sandbox may be met between two states.
const TRIES: u32 = 10;

/// What happens in a network, as it comes ([`Sandbox::network_events`]). Dropping it ends it.
pub struct NetworkEventStream {
    session: Session,
    link: Arc<Link>,
    /// Bytes taken by the caller for which no credit was given back yet.
    owed: u32,
    dropped: u64,
    ended: bool,
}

impl NetworkEventStream {
    async fn open(link: &Arc<Link>) -> R<Self> {
        let session = link
            .begin_session(WATCH, |id, out| cubby_protocol::encode_raw(Kind::WatchNetwork, id, &[], out))
            .await?;
        let mut events = Self { session, link: link.clone(), owed: 0, dropped: 0, ended: false };
        match events.session.next().await {
            Ok(first) if first.kind == Kind::Subscribed => Ok(events),
            Ok(first) if first.kind == Kind::Refused => {
                Err(Error::refused(link.name(), WATCH, decode(&first.payload)?))
            }
            Ok(first) => Err(Error::unexpected(first.kind)),
            Err(error) => Err(link.lost(error, WATCH).await),
        }
    }

    /// The next event. At the end of the sandbox or of the connection it is an error that says so, and then `None`.
    /// Nothing is lost when the future is dropped before it is ready.
    pub async fn next(&mut self) -> Option<R<NetworkEvent>> {
        if self.ended {
            return None;
        }
        let received = match self.session.next().await {
            Ok(incoming) if incoming.kind == Kind::NetworkEvent => self.take(&incoming.payload),
            Ok(incoming) => Err(Error::unexpected(incoming.kind)),
            Err(error) => Err(self.link.lost(error, "network events").await),
        };
        self.ended = received.is_err();
        Some(received)
    }

    /// How many events were lost before the one that came last, because nobody took them in time.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn take(&mut self, payload: &Bytes) -> R<NetworkEvent> {
        // What the sandbox process counts is the whole frame.
        let frame = payload.len() + cubby_protocol::Header::SIZE;
        self.owed = self.owed.saturating_add(u32::try_from(frame).unwrap_or(u32::MAX));
        if self.owed >= INITIAL_WINDOW / 4 {
            self.session.out.push(Kind::Credit, &Credit { bytes: std::mem::take(&mut self.owed) });
        }
        let message::NetworkEvent { lost, at_ns, what } = decode(payload)?;
        self.dropped = self.dropped.saturating_add(lost);
        Ok(NetworkEvent { at: SystemTime::UNIX_EPOCH + Duration::from_nanos(at_ns), kind: what.into() })
    }
}

impl Drop for NetworkEventStream {
    fn drop(&mut self) {
        self.session.out.abandon();
    }
}

impl From<Kinds> for NetworkEventKind {
    fn from(kind: Kinds) -> Self {
        match kind {
            Kinds::Connected(flow) => Self::Connected(flow.into()),
            Kinds::Denied(flow, by) => Self::Denied { flow: flow.into(), by: by.into() },
            Kinds::NameDenied(name, by) => Self::NameDenied { name, by: by.into() },
            Kinds::AnswerDropped(name, address) => Self::AnswerDropped { name, address },
        }
    }
}

impl From<message::NetworkFlow> for NetworkFlow {
    fn from(flow: message::NetworkFlow) -> Self {
        let protocol = match flow.protocol {
            FlowProtocol::Tcp => Protocol::Tcp,
            FlowProtocol::Udp => Protocol::Udp,
            FlowProtocol::Icmp => Protocol::Icmp,
        };
        let direction = if flow.inbound { Direction::Inbound } else { Direction::Outbound };
        Self { protocol, direction, peer: flow.peer, name: flow.name }
    }
}

impl From<message::DeniedBy> for DeniedBy {
    fn from(by: message::DeniedBy) -> Self {
        Self { rule: by.rule.and_then(|rule| usize::try_from(rule).ok()), why: by.why }
    }
}
