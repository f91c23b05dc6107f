//! What a sandbox uses. Numbers of two kinds stand side by side: what the guest says of itself, which its root can
//! forge, and what the host's kernel says of the sandbox process and its disk.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use cubby_protocol::message::{GuestMetrics, MAX_INTERFACES, Reply, Request};
use cubby_protocol::{Kind, decode};

use crate::error::{Error, R};
use crate::link::Link;
use crate::sandbox::Sandbox;

/// What a sandbox uses at one moment. Unless a field says that it is the host's, it is the guest's word.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metrics {
    /// The sandbox.
    pub name: String,
    /// When this was: the host's clock.
    pub at: SystemTime,
    /// Since the guest's kernel started; the time of pauses is not in it.
    pub uptime: Duration,
    /// Processors.
    pub cpu: CpuMetrics,
    /// Memory.
    pub memory: MemoryMetrics,
    /// The file system at `/`, and all disks' traffic.
    pub disk: DiskMetrics,
    /// Network interfaces, loopback included.
    pub network: Vec<InterfaceMetrics>,
    /// Processes in the guest, its agent included.
    pub processes: u32,
    /// Open sessions of all clients, by the sandbox process's count: commands and subscriptions.
    pub sessions: u32,
    /// Connected clients, by the sandbox process's count.
    pub clients: u16,
}

/// Processor time since the guest's boot, of all its processors together, in nanoseconds. The kernel counts it in ticks
/// of 10 ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CpuMetrics {
    /// Virtual processors.
    pub vcpus: u32,
    /// In which something was done: user, nice, system, irq and softirq together.
    pub usage_ns: u64,
    /// In processes.
    pub user_ns: u64,
    /// In processes of low priority.
    pub nice_ns: u64,
    /// In the kernel.
    pub system_ns: u64,
    /// In interrupts.
    pub irq_ns: u64,
    /// In the work that interrupts leave behind.
    pub softirq_ns: u64,
    /// Ready to run while the host ran something else.
    pub steal_ns: u64,
    /// With nothing to do before a disk answers.
    pub iowait_ns: u64,
    /// With nothing to do.
    pub idle_ns: u64,
}

/// Memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryMetrics {
    /// What the guest's kernel manages: a little less than the sandbox was given.
    pub total: u64,
    /// What is taken and cannot be had without swapping: total without available.
    pub used: u64,
    /// What programs can still have. The guest's cache of files counts as available.
    pub available: u64,
    /// Resident memory of the sandbox process, by the host's count: what the guest has touched, and a few MiB.
    pub host_resident: u64,
}

/// Disks in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskMetrics {
    /// Size of the file system at `/`.
    pub total: u64,
    /// What is taken of it.
    pub used: u64,
    /// What the sandbox's disk takes on the host, by the host's count. It is sparse.
    pub host_allocated: u64,
    /// Read from all disks, the image's included, since the guest's boot.
    pub read: u64,
    /// Written since the guest's boot.
    pub written: u64,
}

/// A network interface, since the guest's boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct InterfaceMetrics {
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

impl Sandbox {
    /// What it uses now: the guest's word, and what its process takes of the host. One question to the guest, which is
    /// no use of the sandbox: it does not hold the idle time-out. A sandbox that drains answers, one that is paused does
    /// not: [`Error::InvalidState`].
    pub async fn metrics(&self) -> R<Metrics> {
        measure(&self.link).await
    }
}

/// Asks the guest and the sandbox process at the same time, and looks at what they take of the host.
async fn measure(link: &Link) -> R<Metrics> {
    const OPERATION: &str = "metrics";
    let connection = link.connection(OPERATION).await?;
    let (guest, status) = tokio::join!(connection.ask(Kind::Measure, &[]), connection.call(Request::Status));
    let (guest, status) = match (guest, status) {
        (Ok(guest), Ok(status)) => (guest, status),
        (Err(error), _) | (_, Err(error)) => return Err(link.lost(error, OPERATION).await),
    };
    let guest = match guest.kind {
        Kind::Measured => decode::<GuestMetrics>(&guest.payload)?,
        Kind::Refused => return Err(Error::refused(link.name(), OPERATION, decode(&guest.payload)?)),
        kind => return Err(Error::unexpected(kind)),
    };
    let (sessions, clients) = match status {
        Reply::Status(status) => (status.sessions, status.clients),
        _ => (0, 0),
    };
    let host = Host {
        resident: link.record()?.run.process.map_or(0, |process| resident(process.pid)),
        allocated: allocated(&link.context.store.home().disk(&link.id)),
        sessions,
        clients,
    };
    Ok(put_together(link.name(), guest, &host))
}

/// The host's part.
struct Host {
    resident: u64,
    allocated: u64,
    sessions: u32,
    clients: u16,
}

fn put_together(name: &str, guest: GuestMetrics, host: &Host) -> Metrics {
    let GuestMetrics { uptime_ns, cpus, cpu, memory, root, disk, interfaces, processes } = guest;
    let busy = [cpu.user_ns, cpu.nice_ns, cpu.system_ns, cpu.irq_ns, cpu.softirq_ns];
    Metrics {
        name: name.into(),
        at: SystemTime::now(),
        uptime: Duration::from_nanos(uptime_ns),
        cpu: CpuMetrics {
            vcpus: cpus,
            usage_ns: busy.into_iter().fold(0, u64::saturating_add),
            user_ns: cpu.user_ns,
            nice_ns: cpu.nice_ns,
            system_ns: cpu.system_ns,
            irq_ns: cpu.irq_ns,
            softirq_ns: cpu.softirq_ns,
            steal_ns: cpu.steal_ns,
            iowait_ns: cpu.iowait_ns,
            idle_ns: cpu.idle_ns,
        },
        memory: MemoryMetrics {
            total: memory.total,
            used: memory.total.saturating_sub(memory.available),
            available: memory.available,
            host_resident: host.resident,
        },
        disk: DiskMetrics {
            total: root.total,
            used: root.used,
            host_allocated: host.allocated,
            read: disk.read,
            written: disk.written,
        },
        network: interfaces
            .into_iter()
            .take(MAX_INTERFACES)
            .map(|interface| InterfaceMetrics {
                name: interface.name,
                received_bytes: interface.received_bytes,
                received_packets: interface.received_packets,
                sent_bytes: interface.sent_bytes,
                sent_packets: interface.sent_packets,
            })
            .collect(),
        processes,
        sessions: host.sessions,
        clients: host.clients,
    }
}

/// Resident memory of a process in bytes (proc_pid_status(5)); 0 of one that is gone.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap_or_default();
    kib.saturating_mul(1024)
}

/// Bytes that a file takes on its file system; 0 of one that is gone.
fn allocated(path: &Path) -> u64 {
    /// What `st_blocks` counts in (inode(7)).
    const BLOCK: u64 = 512;
    std::fs::metadata(path).map_or(0, |file| file.blocks().saturating_mul(BLOCK))
}

#[cfg(test)]
pub(crate) mod tests {
    use cubby_protocol::message::{GuestCpu, GuestDisk, GuestFilesystem, GuestInterface, GuestMemory};

    use super::*;

    /// Numbers that can be told apart.
    pub(crate) fn example(name: &str) -> Metrics {
        let guest = GuestMetrics {
            uptime_ns: 1_500_000_000,
            cpus: 2,
            cpu: GuestCpu {
                user_ns: 1_230_000_000,
                nice_ns: 1,
                system_ns: 20_000_000,
                idle_ns: 5,
                iowait_ns: 6,
                irq_ns: 7,
                softirq_ns: 8,
                steal_ns: 9,
            },
            memory: GuestMemory { total: 1000, available: 600 },
            root: GuestFilesystem { total: 5000, used: 70 },
            disk: GuestDisk { read: 11, written: 12 },
            interfaces: vec![GuestInterface { name: "lo".into(), received_bytes: 3, ..Default::default() }],
            processes: 13,
        };
        put_together(name, guest, &Host { resident: 14, allocated: 15, sessions: 16, clients: 17 })
    }

    #[test]
    fn sums_are_those_of_what_they_name() {
        let metrics = example("x");
        assert_eq!(metrics.cpu.usage_ns, 1_230_000_000 + 1 + 20_000_000 + 7 + 8);
        assert_eq!((metrics.memory.used, metrics.memory.available), (400, 600));
        assert_eq!((metrics.disk.used, metrics.disk.host_allocated), (70, 15));
    }

    #[test]
    fn a_guest_may_say_anything() {
        let cpu = GuestCpu { user_ns: u64::MAX, system_ns: u64::MAX, ..Default::default() };
        let memory = GuestMemory { total: 1, available: u64::MAX };
        let interfaces = vec![GuestInterface::default(); 1000];
        let guest = GuestMetrics { uptime_ns: u64::MAX, cpu, memory, interfaces, ..Default::default() };
        let metrics = put_together("x", guest, &Host { resident: 0, allocated: 0, sessions: 0, clients: 0 });
        assert_eq!((metrics.cpu.usage_ns, metrics.memory.used), (u64::MAX, 0));
        assert_eq!(metrics.network.len(), MAX_INTERFACES);
    }

    #[test]
    fn the_host_is_asked_for_what_is_its_own() {
        assert!(resident(std::process::id()) > 1 << 20);
        assert_eq!(resident(u32::MAX), 0);
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 30).unwrap();
        assert!(allocated(file.path()) < 1 << 20, "it is sparse");
        assert_eq!(allocated(Path::new("/no/such/file")), 0);
    }
}
