//! What a card is on its network: its address, and how large a packet may be.

use serde::{Deserialize, Serialize};

/// A card's Ethernet address: of one station, not of a group, and not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "[u8; 6]", into = "[u8; 6]")]
pub struct Mac([u8; 6]);

/// Bytes that are no station's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:02x?} is not the Ethernet address of one station")]
pub struct NotAStation(pub [u8; 6]);

impl Mac {
    /// The bytes, in the order in which they are sent.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<[u8; 6]> for Mac {
    type Error = NotAStation;

    fn try_from(octets: [u8; 6]) -> Result<Self, NotAStation> {
        let [first, ..] = octets;
        if first & 1 != 0 || octets == [0; 6] { Err(NotAStation(octets)) } else { Ok(Self(octets)) }
    }
}

impl From<Mac> for [u8; 6] {
    fn from(mac: Mac) -> Self {
        mac.0
    }
}

/// Bytes of the largest packet in a frame that is not to be cut: at least 1280, which IPv6 needs (RFC 8200 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Mtu(u16);

/// A number that is too small for an MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an mtu of {0} is less than the 1280 bytes that IPv6 needs")]
pub struct SmallMtu(pub u16);

impl Mtu {
    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl Default for Mtu {
    /// 1500, Ethernet's.
    fn default() -> Self {
        Self(1500)
    }
}

impl TryFrom<u16> for Mtu {
    type Error = SmallMtu;

    fn try_from(mtu: u16) -> Result<Self, SmallMtu> {
        if mtu < 1280 { Err(SmallMtu(mtu)) } else { Ok(Self(mtu)) }
    }
}

impl From<Mtu> for u16 {
    fn from(mtu: Mtu) -> Self {
        mtu.0
    }
}
