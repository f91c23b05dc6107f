//! What the guest uses, as its kernel counts it. What cannot be read counts nothing.

use cubby_protocol::message::{
    GuestCpu, GuestDisk, GuestFilesystem, GuestInterface, GuestMemory, GuestMetrics, MAX_INTERFACES,
};
use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, clock_gettime};

/// Most of a file of `/proc` that is read, in bytes.
const MOST: usize = 256 << 10;

/// A clock tick of `/proc/stat` (proc_stat(5)): `USER_HZ` is 100 on every Linux of x86.
const TICK_NS: u64 = 10_000_000;

/// A sector of `/proc/diskstats` (Documentation/admin-guide/iostats.rst), whatever the disk's own are.
const SECTOR: u64 = 512;

/// The guest as it is now.
pub fn measure() -> GuestMetrics {
    let (cpu, cpus) = cpu(&read("/proc/stat"));
    let uptime = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(uptime.tv_sec).unwrap_or_default().saturating_mul(1_000_000_000);
    GuestMetrics {
        uptime_ns: seconds.saturating_add(u64::try_from(uptime.tv_nsec).unwrap_or_default()),
        cpus,
        cpu,
        memory: memory(&read("/proc/meminfo")),
        root: root(),
        disk: disk(&read("/proc/diskstats")),
        interfaces: interfaces(&read("/proc/net/dev")),
        processes: processes(),
    }
}

/// A file of `/proc`. One that root has put something else in the place of holds nobody up.
fn read(path: &str) -> String {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut text = Vec::new();
    if let Ok(file) = rustix::fs::open(path, flags, Mode::empty()) {
        let mut piece = [0; 8 << 10];
        while let Ok(count @ 1..) = rustix::io::read(&file, &mut piece) {
            text.extend_from_slice(piece.get(..count).unwrap_or_default());
            if text.len() >= MOST {
                break;
            }
        }
    }
    String::from_utf8(text).unwrap_or_default()
}

/// The numbers of a line.
fn numbers(line: &str) -> impl Iterator<Item = u64> {
    line.split_ascii_whitespace().map(|field| field.parse().unwrap_or_default())
}

fn cpu(stat: &str) -> (GuestCpu, u32) {
    let (mut all, mut cpus) = (GuestCpu::default(), 0);
    for line in stat.lines() {
        let Some((name, times)) = line.split_once(' ').filter(|(name, _)| name.starts_with("cpu")) else {
            continue;
        };
        if name != "cpu" {
            cpus += 1;
            continue;
        }
        let mut times = numbers(times).map(|ticks| ticks.saturating_mul(TICK_NS));
        let mut next = || times.next().unwrap_or_default();
        all = GuestCpu {
            user_ns: next(),
            nice_ns: next(),
            system_ns: next(),
            idle_ns: next(),
            iowait_ns: next(),
            irq_ns: next(),
            softirq_ns: next(),
            steal_ns: next(),
        };
    }
    (all, cpus)
}

fn memory(meminfo: &str) -> GuestMemory {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| numbers(line).next()).unwrap_or_default().saturating_mul(1024)
    };
    GuestMemory { total: field("MemTotal:"), available: field("MemAvailable:") }
}

fn root() -> GuestFilesystem {
    let Ok(stat) = rustix::fs::statvfs("/") else { return GuestFilesystem::default() };
    let size = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    GuestFilesystem { total: size(stat.f_blocks), used: size(stat.f_blocks.saturating_sub(stat.f_bfree)) }
}

fn disk(diskstats: &str) -> GuestDisk {
    let mut all = GuestDisk::default();
    for line in diskstats.lines() {
        let fields: Vec<u64> = numbers(line).collect();
        // Major, minor, name; reads, merged, sectors, time; writes, merged, sectors.
        if let [_, _, _, _, _, read, _, _, _, written, ..] = fields[..] {
            all.read = all.read.saturating_add(read.saturating_mul(SECTOR));
            all.written = all.written.saturating_add(written.saturating_mul(SECTOR));
        }
    }
    all
}

fn interfaces(dev: &str) -> Vec<GuestInterface> {
    let interface = |line: &str| {
        let (name, counts) = line.split_once(':')?;
        let counts: Vec<u64> = numbers(counts).collect();
        // Eight columns of what was received, then as many of what was sent; bytes and packets are the first.
        let [received_bytes, received_packets, _, _, _, _, _, _, sent_bytes, sent_packets, ..] = counts[..]
        else {
            return None;
        };
        let name = name.trim().into();
        Some(GuestInterface { name, received_bytes, received_packets, sent_bytes, sent_packets })
    };
    dev.lines().filter_map(interface).take(MAX_INTERFACES).collect()
}

/// All processes but the kernel's own, which are the children of process 2.
fn processes() -> u32 {
    let Ok(proc) = std::fs::read_dir("/proc") else { return 0 };
    let is_process = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.parse::<u32>().is_ok());
    let all = proc.flatten().filter(|entry| is_process(&entry.file_name())).count();
    let kernel = match read("/proc/2/task/2/children").split_ascii_whitespace().count() {
        0 => 0,
        children => children + 1,
    };
    u32::try_from(all.saturating_sub(kernel)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_that_of_all_together() {
        let stat =
            "cpu  1 2 3 4 5 6 7 8 9 0\ncpu0 1 1 1 1 1 1 1 1 1 1\ncpu1 0 1 2 3 4 5 6 7 8 9\nintr 5 cpu\n";
        let (cpu, cpus) = cpu(stat);
        assert_eq!(cpus, 2);
        assert_eq!((cpu.user_ns, cpu.idle_ns, cpu.steal_ns), (10_000_000, 40_000_000, 80_000_000));
        assert_eq!((cpu.nice_ns, cpu.system_ns, cpu.iowait_ns), (20_000_000, 30_000_000, 50_000_000));
        assert_eq!((cpu.irq_ns, cpu.softirq_ns), (60_000_000, 70_000_000));
    }

    #[test]
    fn memory_disks_and_interfaces_are_found_by_name_and_column() {
        let meminfo = "MemTotal:       2000 kB\nMemFree: 7 kB\nMemAvailable:   1500 kB\n";
        assert_eq!(memory(meminfo), GuestMemory { total: 2_048_000, available: 1_536_000 });
        let disks = " 254 0 vda 10 0 16 1 0 0 0 0 0 9 9\n 254 16 vdb 1 2 3 4 5 6 7 8 9 10 11 12\nodd\n";
        assert_eq!(disk(disks), GuestDisk { read: 19 * 512, written: 7 * 512 });
        let dev = "Inter-|   Receive |  Transmit\n face |bytes    packets\n    lo:  11 2 0 0 0 0 0 0 33 4 0 0 0 0 0 0\n\
                   eth0:5 6 0 0 0 0 0 0 7 8 0\n";
        let found = interfaces(dev);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].name.as_str(), found[0].received_bytes, found[0].sent_bytes), ("lo", 11, 33));
        assert_eq!((found[1].received_packets, found[1].sent_packets), (6, 8));
    }

    #[test]
    fn what_cannot_be_read_counts_nothing() {
        for text in ["", "cpu", "cpu x y\n", "MemTotal:", ":", "a: 1 2\n1 2 3\n", "\0"] {
            assert_eq!(cpu(text).0, GuestCpu::default(), "{text:?}");
            assert_eq!(memory(text), GuestMemory::default());
            assert_eq!(disk(text), GuestDisk::default());
            assert!(interfaces(text).is_empty());
        }
        let text = format!("cpu {0} {0}\nlo: {0} 1 1 1 1 1 1 1 {0} 1", u64::MAX);
        assert_eq!(cpu(&text).0.user_ns, u64::MAX);
        assert_eq!(read("/no/such/file"), "");
    }
}
