//! The network's part of the supervisor: rules that change, what is told of it, what is counted.

use cubby_protocol::message::{Refused, Reply};
use cubby_state::Status;
use cubby_state::network::{MAX_RULES, NetworkPolicy};

use super::Supervisor;
use crate::network::{self, Exchange, Ticket};
use crate::relay::Asked;

/// The network, as the supervisor has it.
pub(super) struct NetworkOffice {
    pub(super) exchange: Exchange,
    /// Who waits for rules to come into force.
    waiters: Vec<(Ticket, Asked)>,
}

impl NetworkOffice {
    pub(super) fn new(exchange: Exchange) -> Self {
        Self { exchange, waiters: Vec::new() }
    }
}

impl Supervisor<'_> {
    /// Answers once the rules of this ticket are in force.
    pub(super) fn await_rules(&mut self, ticket: Ticket, asked: Asked) {
        if let Some(network) = &mut self.network {
            network.waiters.push((ticket, asked));
        }
        self.on_rules();
    }

    /// What went through the network, if there is one.
    pub(super) fn network_counters(&self) -> Reply {
        let network = self.network.as_ref().zip(self.vm.network_counters());
        let counters = network.map(|(network, card)| network::counters(&network.exchange, &card));
        Reply::NetworkCounters(counters.map(Box::new))
    }

    /// Puts other rules in force for the network, and into the store, whatever the sandbox does otherwise.
    pub(super) fn set_network(&mut self, policy: &str) -> Result<Ticket, Reply> {
        let network = self.network.as_ref().ok_or(Reply::Refused(Refused::NoNetwork))?;
        let failed = |error: &dyn std::error::Error| Reply::Failed(crate::chain(error));
        let policy: NetworkPolicy = serde_json::from_str(policy).map_err(|error| failed(&error))?;
        let rules = policy.rules().len();
        if rules > MAX_RULES {
            return Err(Reply::Failed(format!("{rules} rules, and there may be {MAX_RULES}")));
        }
        self.store.set_network(self.spec.run, &policy).map_err(|error| failed(&error))?;
        Ok(network.exchange.set_rules(policy))
    }

    /// Answers those whose rules are in force. A guest that is paused finds them so when it goes on.
    pub(super) fn on_rules(&mut self) {
        let paused = self.status == Status::Paused;
        let Some(NetworkOffice { exchange, waiters }) = &mut self.network else { return };
        let in_force = exchange.in_force();
        for (_, asked) in waiters.extract_if(.., |(ticket, _)| paused || *ticket <= in_force) {
            self.relay.reply(&asked, &Reply::Done);
        }
    }

    pub(super) fn on_network(&mut self) {
        let Some(network) = &self.network else { return };
        let events = network.exchange.take();
        self.relay.on_network(events);
        self.on_rules();
    }
}
