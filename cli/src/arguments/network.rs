//! Arguments of `cubby network`.

use clap::{Args, Subcommand};
use cubbyhole::NetworkPolicy;

use super::ports;

/// What to do with the network of a sandbox.
#[derive(Debug, Subcommand)]
pub enum Network {
    /// Put another policy in force: connections that it does not allow end, all others go on
    #[command(after_help = "Examples:\n  cubby network set box none\n  cubby network set box @rules.json")]
    Set(Set),
    /// Print whom a sandbox may talk to, as JSON
    Show {
        /// The sandbox
        name: String,
    },
    /// Print connections that open, and what is refused, from now on
    #[command(after_help = "Example:\n  cubby network events --json box | jq 'select(.event == \"denied\")'")]
    Events {
        /// The sandbox
        name: String,
        /// Print JSON, one line each
        #[arg(long)]
        json: bool,
    },
}

/// `cubby network set`
#[derive(Debug, Args)]
pub struct Set {
    /// The sandbox
    pub name: String,
    /// Whom it may talk to: none, public, all, or @FILE with rules in JSON
    #[arg(value_name = "WHOM", value_parser = ports::network)]
    pub policy: NetworkPolicy,
}
