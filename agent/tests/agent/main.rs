//! Drives the real agent, as an ordinary process behind a Unix socket, through the protocol.
//!
//! Without root the agent cannot change users; the tests that need it say so and check what is left.

// The lints exempt test functions, and this is what they share.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, missing_docs)]

mod client;

mod end;
mod events;
mod exec;
mod files;
mod flow;
mod robust;
