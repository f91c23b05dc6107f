//! What a host may have the program in its guest do: one line of text each.

use std::fmt;
use std::str::FromStr;

/// An order. The program says `ready` when its connections are there, waits for a line, does its work, and says `done` and
/// what there is to say; or `failed` and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Send `bytes` over each of so many streams, and wait until the host has ended them.
    Up {
        /// How many.
        streams: u32,
        /// For each.
        bytes: u64,
    },
    /// Receive what the host sends over so many streams.
    Down {
        /// How many.
        streams: u32,
    },
    /// Connect so often, one after another, and end each connection.
    Connect {
        /// How often.
        count: u32,
    },
    /// Send a byte and wait for one, so often, over one connection.
    Ask {
        /// How often.
        count: u32,
    },
    /// Hold so many connections at once; when told, send a byte over each and wait for one; when told again, end them.
    Hold {
        /// How many.
        count: u32,
    },
    /// Exchange streams with the host, so many at once, until told to end: [`crate::exchange`].
    Mix {
        /// What chance begins with.
        seed: u64,
        /// At once.
        workers: u32,
    },
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::Up { streams, bytes } => write!(f, "up {streams} {bytes}"),
            Order::Down { streams } => write!(f, "down {streams}"),
            Order::Connect { count } => write!(f, "connect {count}"),
            Order::Ask { count } => write!(f, "ask {count}"),
            Order::Hold { count } => write!(f, "hold {count}"),
            Order::Mix { seed, workers } => write!(f, "mix {seed} {workers}"),
        }
    }
}

/// A line that is no order.
#[derive(Debug)]
pub struct NoOrder;

impl FromStr for Order {
    type Err = NoOrder;

    fn from_str(line: &str) -> Result<Self, NoOrder> {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default();
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).ok_or(NoOrder);
        let narrow = |number: u64| u32::try_from(number).map_err(|_| NoOrder);
        Ok(match name {
            "up" => Order::Up { streams: narrow(number()?)?, bytes: number()? },
            "down" => Order::Down { streams: narrow(number()?)? },
            "connect" => Order::Connect { count: narrow(number()?)? },
            "ask" => Order::Ask { count: narrow(number()?)? },
            "hold" => Order::Hold { count: narrow(number()?)? },
            "mix" => Order::Mix { seed: number()?, workers: narrow(number()?)? },
            _ => return Err(NoOrder),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_the_order_that_it_was() {
        for order in [
            Order::Up { streams: 32, bytes: 1 << 40 },
            Order::Down { streams: 1 },
            Order::Connect { count: 3 },
            Order::Ask { count: 4 },
            Order::Hold { count: 10_000 },
            Order::Mix { seed: u64::MAX, workers: 8 },
        ] {
            assert_eq!(order.to_string().parse::<Order>().unwrap(), order);
        }
        assert!("up 1".parse::<Order>().is_err() && "".parse::<Order>().is_err());
    }
}
