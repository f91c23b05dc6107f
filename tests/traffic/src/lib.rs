//! Traffic between a guest and its host, for tests and benchmarks: one static program for the guest, whatever runs
//! that, and its other end.
//!
//! The program (`cubby-traffic run ADDRESS`) connects to its host, where a [`Guest`] gives it one [`Order`] after another
//! over that connection; what it is ordered to do it does over connections of their own to the same address. Whoever wants to know
//! how long something takes looks at the host's clock.
//!
//! [`exchange`] has streams on which both ends know every byte that has to come, and how the stream is to end.
#![forbid(unsafe_code)]
// What cannot be done is told by ending with it: this is for tests and benchmarks alone.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

pub mod exchange;
mod guest;
mod order;
pub mod random;

pub use guest::{Guest, attend};
pub use order::Order;

/// Raises the limit of this process's open descriptors as far as it may, and gives what it is then.
pub fn raise_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
