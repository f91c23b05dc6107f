//! What a guest says that it uses. It is the guest's word: its kernel counts, and its root may say anything.

use serde::{Deserialize, Serialize};

/// Most network interfaces that are told.
pub const MAX_INTERFACES: usize = 64;

/// Payload of [`crate::Kind::Measured`]. Times are in nanoseconds, sizes in bytes; all of them but memory, file system
/// and processes count from the guest's boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMetrics {
    /// Since its kernel started; the time of pauses is not in it.
    pub uptime_ns: u64,
    /// Processors that are online.
    pub cpus: u32,
    /// What all of them together did.
    pub cpu: GuestCpu,
    /// Its memory.
    pub memory: GuestMemory,
    /// The file system at `/`.
    pub root: GuestFilesystem,
    /// Its disks.
    pub disk: GuestDisk,
    /// Its network interfaces, loopback included; at most [`MAX_INTERFACES`].
    pub interfaces: Vec<GuestInterface>,
    /// Processes, the agent included, without the kernel's own.
    pub processes: u32,
}

/// Processor time, as proc_stat(5) has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCpu {
    /// In processes.
    pub user_ns: u64,
    /// In processes of low priority.
    pub nice_ns: u64,
    /// In the kernel.
    pub system_ns: u64,
    /// With nothing to do.
    pub idle_ns: u64,
    /// With nothing to do before a disk answers.
    pub iowait_ns: u64,
    /// In interrupts.
    pub irq_ns: u64,
    /// In the work that interrupts leave behind.
    pub softirq_ns: u64,
    /// Ready to run while the host ran something else.
    pub steal_ns: u64,
}

/// Memory, as proc_meminfo(5) has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// What the kernel manages.
    pub total: u64,
    /// What programs can still have without swapping.
    pub available: u64,
}

/// A file system, as statvfs(3) has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFilesystem {
    /// Its size.
    pub total: u64,
    /// What is taken.
    pub used: u64,
}

/// Bytes of all disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDisk {
    /// Read.
    pub read: u64,
    /// Written.
    pub written: u64,
}

/// One network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// Its name.
    pub name: String,
    /// Bytes received.
    pub received_bytes: u64,
    /// Packets received.
    pub received_packets: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
}
