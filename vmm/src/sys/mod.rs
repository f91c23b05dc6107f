//! The system calls that need `unsafe`: memory slots and mappings, the time stamp counter, and the signal that takes a
//! vCPU out of `KVM_RUN`. Every block says why it is sound; the rest of the crate has none.
#![allow(unsafe_code)]

mod entropy;
mod file;
mod kick;
mod memory;
mod tsc;

pub(crate) use entropy::OsEntropy;
pub(crate) use file::{punch_hole, read_exact_at, set_direct, write_all_at, zero_range};
pub(crate) use kick::{KickTarget, install_kick_handler, kick};
pub(crate) use memory::{map_private, prefer_large_pages, set_memory_slot};
pub(crate) use tsc::{hold_back_tsc, host_tsc};
