//! Vsock ports of applications.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The most ports of one sandbox.
pub const MAX_VSOCK_PORTS: usize = 64;

/// A port of the host's context (CID 2) that leads processes of the guest to a Unix socket of the host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VsockPort {
    /// The port that they connect to. 1024 to 1039 are the sandbox's own.
    pub port: u32,
    /// The Unix socket at which somebody listens, whenever one of them does: an absolute path of 107 bytes at most.
    pub path: PathBuf,
}
