//! What Cubbyhole promises, tried on real guests. Each file is one kind of promise; `cargo xtask test` runs them
//! where KVM works, with an image and a registry. They are one binary, so that the image is converted once.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod archive;
mod bad_input;
mod boot;
mod card;
mod chaos;
mod cli;
mod cli_sessions;
mod clients;
mod connections;
mod copy;
mod crash;
mod endurance;
mod events;
mod exec;
mod files;
mod flow;
mod guide;
mod host;
mod image;
mod interactive;
mod lockin;
mod logs;
mod many;
mod metrics;
mod network;
mod network_ends;
mod network_live;
mod ordinary_user;
mod policies;
mod processes;
mod seed;
mod sessions;
mod soak;
mod terminal;
mod tidy;
mod vsock_ports;

/// The other program (`src/bin/client/main.rs`).
const CLIENT: &str = env!("CARGO_BIN_EXE_cubby-test-client");

/// The `cubby` command.
const CUBBY: &str = env!("CARGO_BIN_EXE_cubby-test-cli");
