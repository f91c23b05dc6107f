//! The guest's first process: it sets the guest up as the host says, runs commands for clients, reaps whatever
//! ends, and powers off. One thread, one event loop, no async runtime; the protocol is `cubby-protocol`'s.
//!
//! | module | idea |
//! |---|---|
//! | [`boot`] | from the kernel's first process to Ready |
//! | [`control`] | the connection to the sandbox process |
//! | [`server`] | the event loop |
//! | [`client`], [`session`] | one connection, one command |
//! | [`spawn`] | from a request to a running child |
//! | [`events`], [`metrics`] | events between the host and the guest's processes; what the guest uses |
//! | [`power`] | the end of all processes and of the machine |
//! | [`sys`] | the only unsafe code |
//!
//! What it refuses: clients that are not the host, frames that break the protocol (their sender alone is dropped),
//! more than [`client::MAX_SESSIONS`] sessions and [`server::MAX_CLIENTS`] clients. It is a library so that tests can reach its parts;
//! the product is the binary.
#![deny(unsafe_code)]

pub mod boot;
pub mod client;
pub mod control;
pub mod events;
pub mod files;
pub mod metrics;
pub mod oom;
pub mod output;
pub mod power;
pub mod server;
pub mod session;
pub mod spawn;
pub mod sys;
pub mod token;
