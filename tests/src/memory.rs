//! What a sandbox process holds for itself, beside the memory of its guest, which is the same kind of memory.

use std::fs;

/// A line of `/proc/PID/smaps` and those that belong to it.
struct Mapping {
    start: u64,
    end: u64,
    anonymous_kib: u64,
}

/// Memory of its own of a sandbox process whose guest has so much, in KiB.
pub fn own_kib(pid: u32, guest_mib: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    own(&smaps, guest_mib)
}

fn own(smaps: &str, guest_mib: u32) -> u64 {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some((start, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let number = |hex| u64::from_str_radix(hex, 16).unwrap();
            mappings.push(Mapping { start: number(start), end: number(end), anonymous_kib: 0 });
        } else if first == "Anonymous:" {
            let kib = rest.trim().trim_end_matches(" kB").parse().unwrap();
            mappings.last_mut().unwrap().anonymous_kib = kib;
        }
    }
    let all: u64 = mappings.iter().map(|mapping| mapping.anonymous_kib).sum();
    let guest = guest_memory(&mappings, u64::from(guest_mib) << 20);
    all - guest.expect("guest memory of that size").iter().map(|mapping| mapping.anonymous_kib).sum::<u64>()
}

/// Neighbours that are of this size together: the guest's memory, which may have parts with advice of their own.
fn guest_memory(mappings: &[Mapping], size: u64) -> Option<&[Mapping]> {
    (0..mappings.len()).find_map(|first| {
        let mut end = mappings[first].start;
        let count = mappings[first..]
            .iter()
            .take_while(|mapping| {
                let next = mapping.start == end && end - mappings[first].start < size;
                end = if next { mapping.end } else { end };
                next
            })
            .count();
        (end - mappings[first].start == size).then(|| &mappings[first..first + count])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_does_not_count_whatever_lies_beside_it() {
        let smaps = "1000-2000 rw-p 00000000 00:00 0   [heap]\nSize: 4 kB\nAnonymous:      3 kB\n\
                     f00000-1000000 rw-p 0 00:00 0\nAnonymous: 10 kB\n\
                     1000000-1400000 rw-p 0 00:00 0\nAnonymous: 1000 kB\n\
                     1400000-2000000 rw-p 0 00:00 0\nAnonymous: 2000 kB\nVmFlags: rd wr\n\
                     2000000-2100000 rw-p 0 00:00 0\nAnonymous: 30 kB\n";
        assert_eq!(own(smaps, 16), 43);
        assert!(std::panic::catch_unwind(|| own(smaps, 64)).is_err());
    }
}
