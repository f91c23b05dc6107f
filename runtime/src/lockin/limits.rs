//! Resource limits (getrlimit(2)): a second net under the filters, and the only one for what permitted calls may
//! take. There is none on address space: guest memory is most of it, and the rest is bounded where it is used. Nor is
//! there one on processes: newer kernels start a thread of KVM's own in this one at its first `KVM_RUN`, which would
//! count and fail.

use std::io;

use cubby_state::SandboxConfig;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::refused;
use crate::{network, pipes};

/// Descriptors of a sandbox process besides its clients' and its network's: 32 vCPUs, queues, interrupt lines, files,
/// and the pipes to the guest's ports.
const DESCRIPTORS: u64 = 256 + pipes::MAX_PIPES as u64;

/// The store may grow far beyond a small disk; no file of ours grows beyond this or its disk.
const LARGEST_FILE: u64 = 16 << 30;

/// What a sandbox may grow to.
pub(crate) struct Limits {
    /// Clients at once.
    pub(crate) clients: u16,
    /// Descriptors of its network.
    pub(crate) network: u64,
    /// Size of its disk in bytes.
    pub(crate) disk: u64,
}

impl Limits {
    /// Those of a sandbox. Its network gets what it asks for, or what the host leaves of that.
    pub(crate) fn new(config: &SandboxConfig) -> Self {
        let most = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let left = most.saturating_sub(DESCRIPTORS + u64::from(config.max_clients));
        let network = if config.has_network() { network::descriptors(config).min(left) } else { 0 };
        Self { clients: config.max_clients, network, disk: u64::from(config.disk_mib) << 20 }
    }
}

/// Sets the process's limits, for good.
pub(super) fn set(limits: &Limits) -> io::Result<()> {
    // Guest memory is not for the host's disk. A core_pattern that is a pipe ignores the limit and is told by
    // the filter (core(5)); a kernel without core dumps has no such file.
    match std::fs::write("/proc/self/coredump_filter", "0") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(refused("coredump_filter")(&error));
        }
        _ => {}
    }
    for (resource, limit) in [
        (Resource::Core, 0),
        (Resource::Nofile, DESCRIPTORS + u64::from(limits.clients) + limits.network),
        (Resource::Fsize, limits.disk.max(LARGEST_FILE)),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ] {
        let limit = Some(limit);
        setrlimit(resource, Rlimit { current: limit, maximum: limit })
            .map_err(|errno| refused("limits")(&format!("{resource:?}: {errno}")))?;
    }
    Ok(())
}
