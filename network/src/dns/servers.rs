//! The host's own resolvers, as resolv.conf(5) names them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use crate::config::Resolvers;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How many are asked.
const MOST: usize = 4;
/// A file larger than this is no resolv.conf.
const LARGEST: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Servers {
    source: Resolvers,
    servers: Vec<SocketAddr>,
    looked: Option<Instant>,
    changed: Option<SystemTime>,
}

impl Servers {
    pub(super) fn new(source: Resolvers, now: Instant) -> Self {
        let mut servers = Servers { source, servers: Vec::new(), looked: None, changed: None };
        servers.refresh(now);
        servers
    }

    /// Those to ask now, in their order.
    pub(super) fn get(&mut self, now: Instant) -> &[SocketAddr] {
        if self.looked.is_none_or(|looked| now >= looked + LOOK) {
            self.refresh(now);
        }
        &self.servers
    }

    fn refresh(&mut self, now: Instant) {
        self.looked = Some(now);
        match &self.source {
            Resolvers::Fixed(servers) => self.servers.clone_from(servers),
            Resolvers::File(path) => {
                // A file that cannot be read leaves what it said last.
                let Ok(metadata) = std::fs::metadata(path) else { return };
                let changed = metadata.modified().ok();
                if (changed.is_none() || changed != self.changed)
                    && metadata.len() <= LARGEST
                    && let Ok(text) = std::fs::read_to_string(path)
                {
                    self.changed = changed;
                    self.servers = read(&text);
                }
            }
        }
        self.servers.truncate(MOST);
    }
}

fn read(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        // An address with a scope is of a link that we do not know.
        let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, 53))
    };
    let servers: Vec<_> = text.lines().filter_map(server).collect();
    if servers.is_empty() { vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53)] } else { servers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_as_its_page_says() {
        let text = "# nameserver 9.9.9.9\nsearch example.com\nnameserver 1.1.1.1\n  nameserver\t2001:db8::1 x\n\
                    nameserver fe80::1%eth0\nnameserver nonsense\nnameservers 8.8.8.8\n";
        assert_eq!(read(text), ["1.1.1.1:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
        assert_eq!(read(""), ["127.0.0.1:53".parse().unwrap()]);
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_lost_one_is_not_missed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        let write = |server: &str, seconds: u64| {
            std::fs::write(&path, format!("nameserver {server}\n")).unwrap();
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(at).unwrap();
        };
        let mut now = Instant::now();
        write("1.1.1.1", 1);
        let mut servers = Servers::new(Resolvers::File(path.clone()), now);
        assert_eq!(servers.get(now)[0].ip().to_string(), "1.1.1.1");
        write("2.2.2.2", 2);
        assert_eq!(servers.get(now)[0].ip().to_string(), "1.1.1.1", "it is looked at once in a second");
        now += LOOK;
        assert_eq!(servers.get(now)[0].ip().to_string(), "2.2.2.2");
        std::fs::remove_file(&path).unwrap();
        now += LOOK;
        assert_eq!(servers.get(now)[0].ip().to_string(), "2.2.2.2");
    }
}
