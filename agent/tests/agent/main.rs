//! Drives the real agent, as an ordinary process behind a Unix socket, through the protocol.
//!
//! Without root the agent cannot change users; the tests that need it say so and check what is left.

mod client;

mod end;
mod exec;
mod flow;
mod robust;
