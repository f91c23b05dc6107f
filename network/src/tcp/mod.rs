//! TCP: every connection of the guest ends here, and goes on as a socket of the host.

mod connection;
mod endpoint;
mod segment;
mod seq;
mod table;

pub(crate) use segment::{Outgoing, Segment};
pub(crate) use seq::Seq;
pub(crate) use table::{Due, Ready, Table};
