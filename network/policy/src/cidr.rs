//! Blocks of addresses, and which addresses are public.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A block of addresses: `10.0.0.0/8`, `2001:db8::/32`; a single address stands for itself. Bits beyond the prefix are
/// cleared on reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    network: IpAddr,
    prefix: u8,
}

/// A text that is no block of addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no block of addresses: write an address, or an address/prefix such as 10.0.0.0/8")]
pub struct InvalidCidr {
    /// What was given, its first 64 characters at most.
    pub given: String,
}

/// The bits of an address at the top of 128, and how many an address of its family has.
fn bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    }
}

fn mask(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128u32.saturating_sub(u32::from(prefix))).unwrap_or(0)
}

impl Cidr {
    /// The block of the addresses that share the first `prefix` bits with `address`; `None` if it has fewer.
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let network = match address {
            _ if prefix > bits(address).1 => return None,
            IpAddr::V4(v4) => {
                let kept = mask(prefix).to_be_bytes();
                let [a, b, c, d, ..] = kept;
                IpAddr::V4(v4 & Ipv4Addr::new(a, b, c, d))
            }
            IpAddr::V6(v6) => IpAddr::V6(v6 & Ipv6Addr::from_bits(mask(prefix))),
        };
        Some(Cidr { network, prefix })
    }

    /// Whether the address is in the block. Blocks and addresses of different families have nothing in common.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let ((ours, width), (theirs, other)) = (bits(self.network), bits(address));
        width == other && (ours ^ theirs) & mask(self.prefix) == 0
    }
}

impl From<IpAddr> for Cidr {
    fn from(address: IpAddr) -> Self {
        Cidr { network: address, prefix: bits(address).1 }
    }
}

impl FromStr for Cidr {
    type Err = InvalidCidr;

    fn from_str(text: &str) -> Result<Self, InvalidCidr> {
        let parsed = match text.split_once('/') {
            None => text.parse::<IpAddr>().ok().map(Cidr::from),
            Some((address, prefix)) => match (address.parse(), prefix.parse()) {
                (Ok(address), Ok(prefix)) => Cidr::new(address, prefix),
                _ => None,
            },
        };
        parsed.ok_or_else(|| InvalidCidr { given: text.chars().take(64).collect() })
    }
}

impl TryFrom<String> for Cidr {
    type Error = InvalidCidr;

    fn try_from(text: String) -> Result<Self, InvalidCidr> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> String {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

/// IPv4 blocks that are not the public Internet (IANA's special-purpose registry), and one address in it that
/// answers a cloud's machines alone.
const SPECIAL_V4: [([u8; 4], u8); 16] = [
    ([0, 0, 0, 0], 8),
    ([10, 0, 0, 0], 8),
    ([100, 64, 0, 0], 10),
    ([127, 0, 0, 0], 8),
    // Link-local, with the metadata services of most clouds.
    ([169, 254, 0, 0], 16),
    ([172, 16, 0, 0], 12),
    ([192, 0, 0, 0], 24),
    ([192, 0, 2, 0], 24),
    ([192, 88, 99, 0], 24),
    ([192, 168, 0, 0], 16),
    ([198, 18, 0, 0], 15),
    ([198, 51, 100, 0], 24),
    ([203, 0, 113, 0], 24),
    ([224, 0, 0, 0], 4),
    ([240, 0, 0, 0], 4),
    // The metadata service of Azure's hosts.
    ([168, 63, 129, 16], 32),
];

/// Blocks inside 2000::/3 that are not the public Internet: protocol assignments (Teredo among them, which
/// carries IPv4 addresses), documentation, and 6to4, which carries them too.
const SPECIAL_V6: [([u16; 2], u8); 4] =
    [([0x2001, 0], 23), ([0x2001, 0xdb8], 32), ([0x2002, 0], 16), ([0x3fff, 0], 20)];

/// Whether an address is on the public Internet: not private, loopback, link-local, multicast, reserved, for
/// documentation, or a cloud's metadata service. An IPv6 address that stands for an IPv4 one (mapped, NAT64) is
/// judged as that.
#[must_use]
pub fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => !SPECIAL_V4.iter().any(|(network, prefix)| {
            let network = u32::from_be_bytes(*network);
            (network ^ v4.to_bits()) >> (32 - u32::from(*prefix)) == 0
        }),
        IpAddr::V6(v6) => {
            let [a, b, c, d, e, f, high, low] = v6.segments();
            if [a, b, c, d, e, f] == [0x64, 0xff9b, 0, 0, 0, 0] {
                let embedded = (u32::from(high) << 16) | u32::from(low);
                return is_public(IpAddr::V4(Ipv4Addr::from_bits(embedded)));
            }
            let top = (u32::from(a) << 16) | u32::from(b);
            let special = |([first, second], prefix): &([u16; 2], u8)| {
                let network = (u32::from(*first) << 16) | u32::from(*second);
                (network ^ top) >> (32 - u32::from(*prefix)) == 0
            };
            a & 0xe000 == 0x2000 && !SPECIAL_V6.iter().any(special)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_contain_what_they_should() {
        for (block, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("10.1.2.3/8", "10.0.0.0", "9.255.255.255"),
            ("1.2.3.4", "1.2.3.4", "1.2.3.5"),
            ("0.0.0.0/0", "255.255.255.255", "::1"),
            ("::/0", "2001:db8::1", "1.1.1.1"),
            ("2001:db8::/33", "2001:db8:7fff::1", "2001:db8:8000::"),
            ("::1/128", "::1", "::2"),
        ] {
            let block: Cidr = block.parse().unwrap();
            assert!(block.contains(inside.parse().unwrap()), "{inside} is in {block}");
            assert!(!block.contains(outside.parse().unwrap()), "{outside} is not in {block}");
            assert_eq!(block.to_string().parse::<Cidr>().unwrap(), block);
        }
        for wrong in ["", "/", "10.0.0.0/33", "::/129", "10.0.0/8", "a/8", "1.2.3.4/", "1.2.3.4/-1"] {
            assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn public_is_the_public_internet() {
        for public in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "172.32.0.0",
            "223.255.255.255",
            "168.63.129.15",
            "2606:4700::1111",
            "2a00::1",
            "64:ff9b::808:808",
            "::ffff:8.8.8.8",
            "2001:4860::1",
        ] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for not in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.168.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "168.63.129.16",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::7f00:1",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "3fff::1",
            "5f00::1",
        ] {
            assert!(!is_public(not.parse().unwrap()), "{not}");
        }
    }
}
