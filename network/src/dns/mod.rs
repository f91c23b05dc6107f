//! Names: the guest's resolver is its gateway, which asks those of the host.
//!
//! A question is answered at once if the policy denies the name (with NXDOMAIN: that is what every resolver library takes for an
//! answer; some wait for another server after REFUSED), if it is the host's own name, or from memory. Otherwise it goes on
//! as it came, under another number and from a socket of its own: by UDP if it came by UDP, else by TCP. An answer cut
//! short is passed on as such, and the guest then asks by TCP.
//!
//! What the guest learns is remembered for the rules by name. Addresses to which it could not talk anyway are left out.

mod cache;
mod lookup;
mod message;
mod servers;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use cubby_network_policy::Verdict;

use self::cache::Cache;
use self::lookup::{Lookup, Step};
use self::message::{Code, Query, Records};
use self::servers::Servers;
use crate::config::Resolvers;
use crate::emit::Ends;
use crate::events::{DeniedBy, NetworkEvent};
use crate::shared::Shared;
use crate::slab::Slab;

/// The name that leads to the host's loopback.
pub const HOST_NAME: &str = "host.cubbyhole.internal";
const HOST_TTL: u32 = 60;
/// Headers of IPv6 and UDP.
const HEADERS: usize = 48;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    Udp(Ends),
    Tcp { id: usize, serial: u64 },
}

#[derive(Debug)]
pub(crate) struct Resolver {
    servers: Servers,
    cache: Cache,
    lookups: Slab<Lookup>,
    answers: Vec<(Asker, Vec<u8>)>,
}

impl Resolver {
    pub(crate) fn new(source: Resolvers, now: Instant) -> Self {
        Resolver {
            servers: Servers::new(source, now),
            cache: Cache::default(),
            lookups: Slab::new(),
            answers: Vec::new(),
        }
    }

    /// Answers that are ready.
    pub(crate) fn answers(&mut self) -> Vec<(Asker, Vec<u8>)> {
        std::mem::take(&mut self.answers)
    }

    /// Takes a question. There will be one answer, of whatever kind, unless it is no question at all.
    pub(crate) fn ask(&mut self, asker: Asker, asked: &[u8], shared: &mut Shared, now: Instant) {
        let query = match message::read_query(asked) {
            Ok(query) => query,
            // By TCP an answer is waited for in any case.
            Err(None) if matches!(asker, Asker::Udp(_)) || asked.len() < message::HEADER => {
                shared.counters.malformed += 1;
                if matches!(asker, Asker::Tcp { .. }) {
                    self.answers.push((asker, asked.to_vec()));
                }
                return;
            }
            Err(code) => {
                let code = code.unwrap_or(Code::Malformed);
                self.answers.push((asker, message::bare(asked, None, code, false)));
                return;
            }
        };
        shared.counters.lookups += 1;
        if query.name == HOST_NAME {
            let addresses: [IpAddr; 2] = [shared.link.host_v4.into(), shared.link.host_v6.into()];
            self.answers.push((asker, message::with_addresses(asked, &query, &addresses, HOST_TTL)));
        } else if let Verdict::Denied(by) = shared.policy.decide_name(&query.name) {
            self.answers.push((asker, message::bare(asked, Some(query.end), Code::NoName, false)));
            shared.deny_name(query.name, DeniedBy::Policy(by));
        } else if let Some(answer) = self.cache.get(asked, &query, now) {
            shared.counters.lookups_cached += 1;
            self.give(asker, asked, &query, answer, shared, now);
        } else if self.lookups.len() >= shared.limits.lookups {
            self.answers.push((asker, message::bare(asked, Some(query.end), Code::Failed, false)));
            shared.deny_name(query.name, DeniedBy::Lookups);
        } else {
            let lookup = Lookup::new(asker, asked.to_vec(), query, now);
            let id = self.lookups.insert(lookup);
            self.step(id, Step::Next, shared, now);
        }
    }

    /// Something has happened to a lookup's socket.
    pub(crate) fn on_ready(&mut self, id: usize, shared: &mut Shared, now: Instant) {
        if let Some(lookup) = self.lookups.get_mut(id) {
            let step = lookup.on_ready();
            self.step(id, step, shared, now);
        }
    }

    fn step(&mut self, id: usize, mut step: Step, shared: &mut Shared, now: Instant) {
        let Some(lookup) = self.lookups.get_mut(id) else { return };
        while matches!(step, Step::Next) {
            step = lookup.next_server(self.servers.get(now), id, shared, now);
        }
        match step {
            Step::Wait | Step::Next => {}
            Step::Answered(answer) => {
                let Some(lookup) = self.lookups.remove(id) else { return };
                self.cache.keep(&lookup.asked, &lookup.query, &answer, now);
                let mut answer = answer;
                message::set_id(&mut answer, message::id(&lookup.asked));
                self.give(lookup.asker, &lookup.asked, &lookup.query, answer, shared, now);
            }
            Step::Failed => {
                let Some(lookup) = self.lookups.remove(id) else { return };
                let answer = message::bare(&lookup.asked, Some(lookup.query.end), Code::Failed, false);
                self.answers.push((lookup.asker, answer));
            }
        }
    }

    /// Gives an answer to the guest, without what it may not use, and remembers the rest.
    fn give(
        &mut self,
        asker: Asker,
        asked: &[u8],
        query: &Query,
        mut answer: Vec<u8>,
        shared: &mut Shared,
        now: Instant,
    ) {
        let (mut kept, mut dropped, mut least) = (Vec::new(), Vec::new(), u32::MAX);
        for record in Records::of(&answer, query.end).flatten() {
            if let Some(address) = record.address() {
                if shared.policy.may_answer(&query.name, address) {
                    least = least.min(record.ttl);
                    kept.push(address);
                } else {
                    dropped.push(address);
                }
            }
        }
        let is_whole = Records::of(&answer, query.end).all(|record| record.is_some());
        for address in &kept {
            let lifetime = Duration::from_secs(least.into());
            shared.names.learn(&query.name, *address, lifetime, now);
        }
        if !is_whole && !message::is_truncated(&answer) {
            answer = message::bare(asked, Some(query.end), Code::Failed, false);
        } else if !dropped.is_empty() {
            answer = message::with_addresses(asked, query, &kept, least.min(HOST_TTL));
        }
        for address in dropped {
            shared.event(NetworkEvent::AnswerDropped { name: query.name.clone(), address });
        }
        let takes = query.takes.min(shared.mtu.saturating_sub(HEADERS));
        if matches!(asker, Asker::Udp(_)) && answer.len() > takes {
            answer = message::bare(asked, Some(query.end), Code::NoError, true);
        }
        self.answers.push((asker, answer));
    }

    /// When [`Resolver::on_time`] is to be called.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.lookups.iter().map(|(_, lookup)| lookup.deadline).min()
    }

    /// Asks the next server for what has no answer in its time.
    pub(crate) fn on_time(&mut self, shared: &mut Shared, now: Instant) {
        shared.names.expire_sometimes(now);
        let late: Vec<_> =
            self.lookups.iter().filter(|(_, lookup)| lookup.deadline <= now).map(|(id, _)| id).collect();
        for id in late {
            self.step(id, Step::Next, shared, now);
        }
    }
}
