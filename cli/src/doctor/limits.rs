//! Resource limits (getrlimit(2)) under which a sandbox process could not do its work. There is none on locked memory:
//! nothing is locked.

use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::amount::bytes;

/// A limit, the least that is enough, and how a shell raises it.
struct Limit {
    what: &'static str,
    resource: Resource,
    least: u64,
    /// Whether it counts bytes.
    bytes: bool,
    remedy: &'static str,
}

const LIMITS: [Limit; 4] = [
    Limit {
        what: "open files",
        resource: Resource::Nofile,
        // Two for each sandbox of a program, and some for a pull.
        least: 256,
        bytes: false,
        remedy: "raise the limit: ulimit -n 1024",
    },
    Limit {
        what: "processes",
        resource: Resource::Nproc,
        // Six threads for each sandbox, besides all else that the user runs.
        least: 256,
        bytes: false,
        remedy: "raise the limit: ulimit -u 4096",
    },
    Limit {
        what: "file size",
        resource: Resource::Fsize,
        // A sandbox's own disk, sparse as it is.
        least: 4 << 30,
        bytes: true,
        remedy: "lift the limit: ulimit -f unlimited, or make smaller disks (--disk 1g)",
    },
    Limit {
        what: "address space",
        resource: Resource::As,
        // The guest's memory is mapped as a whole.
        least: 2 << 30,
        bytes: true,
        remedy: "lift the limit: ulimit -v unlimited",
    },
];

/// All of them, as they are for this process.
pub fn check() -> impl Iterator<Item = Check> {
    LIMITS.iter().map(|limit| judge(limit, getrlimit(limit.resource).current))
}

fn judge(limit: &Limit, current: Option<u64>) -> Check {
    let found = match current {
        None => "no limit".to_owned(),
        Some(bound) if limit.bytes => format!("{} at most", bytes(bound)),
        Some(bound) => format!("{bound} at most"),
    };
    match current {
        Some(bound) if bound < limit.least => Check::bad(limit.what, found, limit.remedy),
        _ => Check::good(limit.what, found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_has_a_remedy() {
        for limit in &LIMITS {
            assert_eq!(judge(limit, None).remedy, None);
            assert_eq!(judge(limit, Some(limit.least)).remedy, None);
            assert!(
                judge(limit, Some(limit.least - 1)).remedy.unwrap().contains("ulimit -"),
                "{}",
                limit.what
            );
        }
    }
}
