//! x86_64: where things lie in guest memory, what a processor looks like before its first instruction,
//! and the tables that Linux reads in place of firmware's.

mod boot;
pub(crate) mod cpu;
pub(crate) mod layout;
mod mptable;

pub(crate) use boot::{Boot, place};
