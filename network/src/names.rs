//! Which names have led the guest to an address: what a rule by name goes by.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Addresses that are remembered, and names of each. Those that end first make room.
const ADDRESSES: usize = 4096;
const NAMES: usize = 16;
/// Programs keep addresses longer than they may: an answer holds at least as long, and at most.
const LEAST: Duration = Duration::from_secs(300);
const MOST: Duration = Duration::from_secs(86_400);

/// Names by address.
#[derive(Debug, Default)]
pub(crate) struct Names {
    by_address: HashMap<IpAddr, Vec<(String, Instant)>>,
    expired: Option<Instant>,
}

impl Names {
    /// The guest has been told that this name stands for this address.
    pub(crate) fn learn(&mut self, name: &str, address: IpAddr, lifetime: Duration, now: Instant) {
        let until = now + lifetime.clamp(LEAST, MOST);
        if self.by_address.len() >= ADDRESSES && !self.by_address.contains_key(&address) {
            self.forget_some(now);
        }
        let names = self.by_address.entry(address.to_canonical()).or_default();
        names.retain(|(known, _)| known != name);
        if names.len() >= NAMES
            && let Some(first) = (0..names.len()).min_by_key(|at| names.get(*at).map(|(_, until)| *until))
        {
            names.swap_remove(first);
        }
        names.push((name.to_owned(), until));
    }

    /// Names that have led to the address, until they expire.
    pub(crate) fn of(&self, address: IpAddr) -> Vec<&str> {
        self.by_address
            .get(&address.to_canonical())
            .map(|names| names.iter().map(|(name, _)| name.as_str()).collect())
            .unwrap_or_default()
    }

    /// Forgets what no longer holds, if it has not just done so.
    pub(crate) fn expire_sometimes(&mut self, now: Instant) {
        if self.expired.is_none_or(|expired| now >= expired + LEAST / 4) {
            self.expired = Some(now);
            self.expire(now);
        }
    }

    /// Forgets what no longer holds.
    fn expire(&mut self, now: Instant) {
        self.by_address.retain(|_, names| {
            names.retain(|(_, until)| now < *until);
            !names.is_empty()
        });
    }

    fn forget_some(&mut self, now: Instant) {
        self.expire(now);
        if self.by_address.len() >= ADDRESSES {
            let last = |names: &[(String, Instant)]| names.iter().map(|(_, until)| *until).max();
            let mut ends: Vec<_> = self.by_address.values().filter_map(|names| last(names)).collect();
            ends.sort_unstable();
            // A quarter at once, so that a flood of names does not sort for each.
            if let Some(limit) = ends.get(ADDRESSES / 4).copied() {
                self.by_address.retain(|_, names| last(names).is_some_and(|until| until > limit));
            }
            while self.by_address.len() >= ADDRESSES {
                let Some(any) = self.by_address.keys().next().copied() else { break };
                self.by_address.remove(&any);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_for_their_time_and_are_bounded() {
        let (mut names, start) = (Names::default(), Instant::now());
        let address = |n: u32| IpAddr::from(std::net::Ipv4Addr::from_bits(n));
        names.learn("a.b", address(1), Duration::from_secs(1), start);
        names.learn("c.d", address(1), Duration::from_secs(1000), start);
        assert_eq!(names.of("::ffff:0.0.0.1".parse().unwrap()), ["a.b", "c.d"]);
        names.expire(start + LEAST);
        assert_eq!(names.of(address(1)), ["c.d"]);
        for n in 0..20_000 {
            names.learn(&format!("n{n}"), address(2 + n % 10_000), Duration::ZERO, start);
            names.learn(&format!("n{n}"), address(1), Duration::ZERO, start);
        }
        assert!(names.by_address.len() <= ADDRESSES);
        assert!(names.by_address.values().all(|names| names.len() <= NAMES));
    }
}
