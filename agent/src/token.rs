//! What an epoll event is about, packed into its 64 bits.

use crate::session::Which;

/// The owner of a watched descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// A child ended.
    Children,
    /// The control connection.
    Control,
    /// A client wants to connect.
    Listener,
    /// The connection of the client in this slot.
    Client(u16),
    /// A stream of a client's session.
    Session(u16, u32, Which),
    /// A stream that outlived its session.
    Held(u32),
    /// A guest process wants to exchange events.
    Events,
    /// The connection of such a process.
    Guest(u32),
    /// Something was done with files.
    Files,
}

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        let (kind, slot, number) = match token {
            Token::Children => (0, 0, 0),
            Token::Control => (1, 0, 0),
            Token::Listener => (2, 0, 0),
            Token::Client(slot) => (3, slot, 0),
            Token::Session(slot, session, Which::Stdin) => (4, slot, session),
            Token::Session(slot, session, Which::Stdout) => (5, slot, session),
            Token::Session(slot, session, Which::Stderr) => (6, slot, session),
            Token::Held(number) => (7, 0, number),
            Token::Events => (12, 0, 0),
            Token::Guest(number) => (13, 0, number),
            Token::Files => (8, 0, 0),
        };
        kind << 48 | Self::from(slot) << 32 | Self::from(number)
    }
}

impl From<u64> for Token {
    fn from(bits: u64) -> Self {
        let [n0, n1, n2, n3, s0, s1, kind, _] = bits.to_le_bytes();
        let (slot, number) = (u16::from_le_bytes([s0, s1]), u32::from_le_bytes([n0, n1, n2, n3]));
        match kind {
            0 => Self::Children,
            1 => Self::Control,
            2 => Self::Listener,
            3 => Self::Client(slot),
            4 => Self::Session(slot, number, Which::Stdin),
            5 => Self::Session(slot, number, Which::Stdout),
            6 => Self::Session(slot, number, Which::Stderr),
            12 => Self::Events,
            13 => Self::Guest(number),
            8 => Self::Files,
            _ => Self::Held(number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_their_bits() {
        for token in [
            Token::Children,
            Token::Control,
            Token::Listener,
            Token::Client(u16::MAX),
            Token::Session(3, u32::MAX, Which::Stdin),
            Token::Session(u16::MAX, 1, Which::Stdout),
            Token::Session(1, 7, Which::Stderr),
            Token::Held(9),
            Token::Events,
            Token::Guest(u32::MAX),
            Token::Files,
        ] {
            assert_eq!(Token::from(u64::from(token)), token);
        }
    }
}
