//! What a sandbox uses. Numbers of two kinds stand side by side: what the guest says of itself, which its root can
//! forge, and what the host's kernel says of the sandbox process and its disk.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use cubby_protocol::message::{GuestMetrics, MAX_INTERFACES, NetworkCounters, Reply, Request};
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
    /// The network by the sandbox process's count; `None` of a sandbox that has none.
    pub host_network: Option<NetworkMetrics>,
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

/// What went through a sandbox's network card and what became of it, since the sandbox process began and by its own
/// count, which nobody in the guest can forge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetworkMetrics {
    /// Frames from the guest. One that stands for many segments, of up to 64 KiB, counts as one.
    pub sent_frames: u64,
    /// Their bytes, from the Ethernet header on.
    pub sent_bytes: u64,
    /// Frames to the guest.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// The guest's frames that were dropped.
    pub dropped: DroppedFrames,
    /// TCP connections that have been opened.
    pub tcp_opened: u64,
    /// TCP connections that are held now.
    pub tcp_open: u64,
    /// TCP connections that the other side, or the host, refused or could not reach.
    pub tcp_failed: u64,
    /// Flows of UDP and echo requests that have been opened.
    pub udp_opened: u64,
    /// Flows of UDP and echo requests that are held now.
    pub udp_open: u64,
    /// Datagrams that went nowhere: larger than the link or the socket takes, or the socket was full.
    pub udp_dropped: u64,
    /// Names that the guest has asked for.
    pub lookups: u64,
    /// Connections, flows and names that the policy refused.
    pub denied: u64,
    /// Connections, flows and names that a limit refused.
    pub limited: u64,
    /// Small frames that the guest did not fetch in time: answers, refusals, datagrams from published ports.
    pub replies_lost: u64,
}

/// The guest's frames that went nowhere, by what was wrong with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DroppedFrames {
    /// Their virtio header asks for what cannot be, or they are longer than the card takes.
    pub refused: u64,
    /// They break the rules of a layer.
    pub malformed: u64,
    /// Their checksum is wrong.
    pub checksum: u64,
    /// They come from an address, of Ethernet or IP, that is not the guest's.
    pub spoofed: u64,
    /// They are parts of packets.
    pub fragments: u64,
    /// They are for others, or of protocols that are not spoken.
    pub ignored: u64,
}

impl DroppedFrames {
    /// Each cause with its count.
    pub fn causes(&self) -> [(&'static str, u64); 6] {
        let Self { refused, malformed, checksum, spoofed, fragments, ignored } = *self;
        [
            ("refused", refused),
            ("malformed", malformed),
            ("checksum", checksum),
            ("spoofed", spoofed),
            ("fragments", fragments),
            ("ignored", ignored),
        ]
    }
}

impl From<NetworkCounters> for NetworkMetrics {
    fn from(counters: NetworkCounters) -> Self {
        let dropped = counters.dropped;
        Self {
            sent_frames: counters.sent_frames,
            sent_bytes: counters.sent_bytes,
            received_frames: counters.received_frames,
            received_bytes: counters.received_bytes,
            dropped: DroppedFrames {
                refused: dropped.refused,
                malformed: dropped.malformed,
                checksum: dropped.checksum,
                spoofed: dropped.spoofed,
                fragments: dropped.fragments,
                ignored: dropped.ignored,
            },
            tcp_opened: counters.tcp_opened,
            tcp_open: counters.tcp_open,
            tcp_failed: counters.tcp_failed,
            udp_opened: counters.udp_opened,
            udp_open: counters.udp_open,
            udp_dropped: counters.udp_dropped,
            lookups: counters.lookups,
            denied: counters.denied,
            limited: counters.limited,
            replies_lost: counters.replies_lost,
        }
    }
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
    let (guest, status, network) = tokio::join!(
        connection.ask(Kind::Measure, &[]),
        connection.call(Request::Status),
        connection.call(Request::NetworkCounters),
    );
    let (guest, status, network) = match (guest, status, network) {
        (Ok(guest), Ok(status), Ok(network)) => (guest, status, network),
        (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => {
            return Err(link.lost(error, OPERATION).await);
        }
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
        network: match network {
            Reply::NetworkCounters(counters) => counters.map(|counters| (*counters).into()),
            _ => None,
        },
    };
    Ok(put_together(link.name(), guest, &host))
}

/// The host's part.
struct Host {
    resident: u64,
    allocated: u64,
    sessions: u32,
    clients: u16,
    network: Option<NetworkMetrics>,
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
        host_network: host.network,
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

    fn host(network: Option<NetworkMetrics>) -> Host {
        Host { resident: 14, allocated: 15, sessions: 16, clients: 17, network }
    }

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
        let dropped = DroppedFrames { spoofed: 29, ..DroppedFrames::default() };
        let network =
            NetworkMetrics { sent_frames: 18, tcp_open: 22, denied: 27, dropped, ..Default::default() };
        put_together(name, guest, &host(Some(network)))
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
        let metrics = put_together("x", guest, &host(None));
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
